"""The rows of a real node's data as its ledger knows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from fedsb.app.client_data import client_examples, site_rows
from fedsb.config.schema import Config
from fedsb.data import read_private_rows
from fedsb.privacy.rows import Hashes, hash_rows

_LAST: dict[str, Hashes] = {}  # of the last data that were asked for: a node serves one client


def rows_of(config: Config, client: str, data_path: str | None, labels: tuple[str, ...], salt: bytes) -> Hashes:
    """Return the salted hashes of all that a client holds, what it holds out or leaves out included; see :mod:`fedsb.privacy.rows`.

    A row that is left out, for nothing of it would be learnt, is told of all the same: by how many are left.

    Raises:
        UserError: the data cannot be read.
    """
    place = (config.data, config.federation, config.seed, config.privacy.unit, client, data_path, labels)
    name = f"{place!r} {salt.hex()}"
    if name not in _LAST:
        parts = client_examples(config, client, None, labels) if data_path is None else site_rows(config, data_path, labels)
        _LAST.clear()
        _LAST[name] = np.unique(np.concatenate([hash_rows(part.texts, part.pairs, salt) for part in parts]))
    return _LAST[name]


def forget_rows() -> None:
    """Read rows again where they are asked for next."""
    _LAST.clear()


def readable_rows(config: Config, client: str, data_path: str | None, labels: tuple[str, ...], salt: bytes) -> Hashes:
    """Return the hashes of what can be read of a client's data, where a run may be refused for what they hold.

    A refusal tells of the rows, as that all have a label which the server names; so they are known by their texts, whatever their labels
    are, and row by row where a file of the node's cannot be read as a whole. Without any to be read a refusal tells of the file alone.
    """
    if data_path is None or config.data.test_path is None:
        return _readable(config, client, data_path, labels, salt)
    alone = replace(config, data=replace(config.data, test_path=None))  # each file by itself: one may be broken
    return np.unique(np.concatenate([_readable(alone, client, path, labels, salt) for path in (data_path, config.data.test_path)]))


def _readable(config: Config, client: str, data_path: str | None, labels: tuple[str, ...], salt: bytes) -> Hashes:
    unlabelled = replace(config, data=replace(config.data, task="causal_lm", label=None))

    def labelled() -> Hashes:
        return rows_of(config, client, data_path, labels, salt)

    def whole() -> Hashes:
        return rows_of(unlabelled, client, data_path, (), salt)

    def by_row(path: str) -> Hashes:
        held = read_private_rows(unlabelled.data, path, (), no_target=math.nan).examples
        return hash_rows(held.texts, held.pairs, salt)

    ways: list[Callable[[], Hashes]] = [labelled, whole, *([] if data_path is None else [partial(by_row, data_path)])]
    for read in ways:
        with suppress(Exception):  # what is wrong with them is told by who reads them next
            return read()
    return hash_rows((), None, salt)
