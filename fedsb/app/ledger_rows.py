"""The rows of a real node's data as its ledger knows them."""

from __future__ import annotations

import numpy as np

from fedsb.app.assembly import client_examples, site_rows
from fedsb.config.schema import Config
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
        parts = client_examples(config, client, None, labels) if data_path is None else (site_rows(config, data_path, labels),)
        _LAST.clear()
        _LAST[name] = np.unique(np.concatenate([hash_rows(part.texts, part.pairs, salt) for part in parts]))
    return _LAST[name]
