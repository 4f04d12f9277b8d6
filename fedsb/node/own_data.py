"""A real node's own data: what is wrong with them has a key, and under ``privacy.unit=example`` no row decides about another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, TypeVar

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, is_fault
from fedsb.data import Examples, PrivateRows, count_rows, read_private_rows
from fedsb.node.refusals import key_of
from fedsb.tasks.task import Task

LOG = logging.getLogger(__name__)
MOST_SAID = 20
Features = list[dict[str, Any]]
Value = TypeVar("Value")
MOST_CHARACTERS = 100  # of a text, for each token that is read of it


def at_site(read: Callable[[], Value]) -> Value:
    """Read a real node's data; what is wrong with them is at its ``data-path``, if it is at no other key.

    Raises:
        UserError: as it came, with its key.
    """
    try:
        return read()
    except UserError as error:
        error.key = key_of(error) or "data-path"
        raise


def private_count(cfg: DataConfig, data_path: str) -> int:
    """Return how many examples a private client has: its rows, which are counted and not read.

    Raises:
        UserError: there is no table with rows.
    """
    return at_site(lambda: count_rows(cfg, data_path))


def private_rows(cfg: DataConfig, data_path: str, labels: tuple[str, ...], task: Task) -> PrivateRows:
    """Return a private client's rows, each in its place.

    Raises:
        UserError: see :func:`fedsb.data.read_private_rows`.
    """
    return at_site(lambda: read_private_rows(cfg, data_path, labels, no_target=task.no_target))


def private_features(
    rows: PrivateRows,
    max_length: int,
    tokenised: Callable[[Examples], Features],
    *,
    no_target: float,
    shorten: Callable[[str, int], str] = lambda text, most: text[:most],
) -> Features:
    """Return an example for each row; one that cannot be used, or that the tokenizer does not take, is an empty text without a loss.

    It has the frame of a text where there are targets: models that look for its end refuse a batch in which one has none. For a
    language model, which learns a frame too, it is a single token.

    Args:
        rows: of the client.
        max_length: tokens that are read of a text; a gigantic one is cut before it costs more than a long one.
        tokenised: puts tokens and targets of examples together.
        no_target: the task's target of an example without a loss.
        shorten: cuts a text to a number of characters.
    """
    most, held = max_length * MOST_CHARACTERS, rows.examples
    pairs = None if held.pairs is None else tuple(shorten(text, most) for text in held.pairs)
    held = replace(held, texts=tuple(shorten(text, most) for text in held.texts), pairs=pairs)
    features, untaken = _each(held, tokenised, no_target)
    _say_cut(features, {*rows.unusable, *untaken})
    if held.targets is None:
        for place in {*rows.unusable, *untaken}:
            features[place] = {key: value[:1] if isinstance(value, list) else value for key, value in features[place].items()}
    return features


def _say_cut(features: Features, known: Collection[int]) -> None:
    """Name the rows of instruction data of which nothing is learnt, since what is read of them ends before a response begins."""
    cut = [place for place, feature in enumerate(features) if not any(feature.get("learnt", [1])[1:]) and place not in known]
    if cut and "learnt" in features[cut[0]]:
        said, more = ", ".join(str(place + 1) for place in cut[:MOST_SAID]), " …" * (len(cut) > MOST_SAID)
        LOG.warning("train.max_length leaves nothing of %d responses; these rows take part without a loss: %s%s", len(cut), said, more)


def _each(held: Examples, tokenised: Callable[[Examples], Features], no_target: float) -> tuple[Features, list[int]]:
    """Return the features of all rows, and the places of those that the tokenizer does not take: their words may have no number.

    Rows that are refused are found by halves, so that the others are not tokenised one by one for their sake.
    """
    features: Features = []
    untaken: dict[int, str] = {}

    def take(start: int, end: int) -> None:
        part = held.take(range(start, end))
        try:
            features.extend(tokenised(part))
        except BaseException as error:  # the tokenizers library raises bare ones, and panics
            if not is_fault(error):
                raise
            if end - start > 1:
                middle = (start + end) // 2
                take(start, middle)
                take(middle, end)
                return
            empty = Examples(("",), None if part.pairs is None else ("",), None if part.targets is None else (no_target,))
            features.extend(tokenised(empty))
            untaken[start] = type(error).__name__

    if len(held):
        take(0, len(held))
    for place, why in list(untaken.items())[:MOST_SAID]:
        LOG.warning("row %d: the tokenizer does not take it (%s); it takes part without a loss", place + 1, why)
    if len(untaken) > MOST_SAID:
        LOG.warning("the tokenizer does not take %d rows in all", len(untaken))
    return features, list(untaken)
