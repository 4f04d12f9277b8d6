"""A real node's data under ``privacy.unit=example``: every row is an example, whatever it holds.

A row that cannot be used keeps its place, without a text and with a target that has no loss: it is zeroed out, which is what makes two data
sets neighbours. How many rows there are, and what becomes of the others, does not depend on it. Which rows these are, and why, is for
the node's own log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError, nearest
from fedsb.data.cells import is_torn, kind_of
from fedsb.data.examples import Examples, label_column, label_text, text_columns
from fedsb.data.instructions import RowError, columns_of, row_text, way_of
from fedsb.data.private_tables import private_table, read_private_table
from fedsb.data.sources import read_path
from fedsb.data.tables import Table, class_names, named_columns

LOG = logging.getLogger(__name__)
MOST_SAID = 20
LARGEST = 3.4e38  # what float32 holds
Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class PrivateRows:
    """The rows of a client, each in its place.

    Attributes:
        examples: an empty text, and a target without a loss, for a row that cannot be used.
        unusable: why, by the place of such a row, from 0.
    """

    examples: Examples
    unusable: Mapping[int, str]

    def take(self, places: Sequence[int]) -> PrivateRows:
        """Return the rows at ``places``, in that order."""
        unusable = {i: self.unusable[place] for i, place in enumerate(places) if place in self.unusable}
        return PrivateRows(self.examples.take(places), unusable)


class _UnusableError(Exception):
    """Why a row cannot be used, in words that hold nothing of it."""


def count_rows(cfg: DataConfig, path: str | Path) -> int:
    """Return how many rows a client has; what they hold is not looked at.

    Raises:
        UserError: no table is there, or none of its rows.
    """
    table = private_table(read_path(path, cfg, read=lambda file, cfg, wanted: read_private_table(file, cfg, ())), ())
    return _counted(table, path)


def read_private_rows(cfg: DataConfig, path: str | Path, labels: Sequence[str], *, no_target: float) -> PrivateRows:
    """Read the training part of one client of a real federation.

    Args:
        cfg: names the columns and the task.
        path: a file or folder of the client's own.
        labels: names of the classes of the run, in order.
        no_target: the task's target of an example without a loss.

    Raises:
        UserError: no table, no rows, or a header without a column that the configuration names.
    """
    table = private_table(read_path(path, cfg, read=read_private_table), named_columns(cfg))
    _counted(table, path)
    if way_of(cfg):
        return _conversations(cfg, table)
    first, second = text_columns(cfg)
    label = None if cfg.task == "causal_lm" else label_column(cfg)
    _check_header(table, ("data.text", first), ("data.text", second), ("data.label", label))
    readers: dict[str, Reader] = {name: _text for name in (first, second) if name}
    if label:
        readers[label] = _TARGETS[cfg.task](label, class_names(table, label), labels)
    rows = [_row({name: table[name][i] for name in readers}, readers) for i in range(len(table))]
    unusable = {i: row for i, row in enumerate(rows) if isinstance(row, str)}
    _say(unusable, len(rows))
    filler: dict[str, Any] = dict.fromkeys(readers, "") | ({label: no_target} if label else {})
    return PrivateRows(_examples([filler if isinstance(row, str) else row for row in rows], first, second, label), unusable)


def _conversations(cfg: DataConfig, table: Table) -> PrivateRows:
    columns = columns_of(cfg)
    _check_header(table, *((f"data.{way_of(cfg)} with column", name) for name, may in columns.items() if may != "be missing"))
    rows: list[str] = []
    unusable: dict[int, str] = {}
    for i in range(len(table)):
        try:
            rows.append(row_text(cfg, {name: table[name][i] for name in columns if name in table.values}))
        except (RowError, RecursionError) as error:
            unusable[i] = str(error) if isinstance(error, RowError) else "lists too deep in each other"
            rows.append("")
    _say(unusable, len(rows))
    return PrivateRows(Examples(tuple(rows)), unusable)


def _examples(rows: Sequence[Mapping[str, Any]], first: str, second: str | None, label: str | None) -> Examples:
    texts, pairs, targets = (tuple(row[name] for row in rows) if name else None for name in (first, second, label))
    return Examples(texts or (), pairs, targets)


def _counted(table: Table, path: str | Path) -> int:
    if not len(table):
        raise UserError(f"{path} has no rows", key="data-path")
    return len(table)


def _check_header(table: Table, *named: tuple[str, str | None]) -> None:
    for key, name in named:
        if name and (times := list(table.column_names).count(name)) != 1:
            what = "has no such column" if not times else f"has {times} columns of that name"
            raise UserError(f"{key}={name}: the client's own data {what}{nearest(name, table.column_names)}")


def _row(values: Mapping[str, Any], readers: Mapping[str, Reader]) -> dict[str, Any] | str:
    """Return what a row is made of, or why it cannot be used."""
    try:
        return {name: read(values[name]) for name, read in readers.items()}
    except _UnusableError as error:
        return str(error)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _UnusableError("no text" if value is None else "a text that is none")
    if not value.strip() or is_torn(value):
        raise _UnusableError("an empty text" if not value.strip() else "half of a character")
    return value


def _class_of(column: str, names: Sequence[str] | None, labels: Sequence[str]) -> Reader:
    index = {label: i for i, label in enumerate(labels)}

    def read(value: Any) -> int:
        try:
            named = names[value] if names is not None and value in range(len(names)) else value
            found = None if kind_of(named) is None or named is None else index.get(label_text(named, column, 0, "site"))
        except (UserError, ValueError, OverflowError):
            found = None
        if found is None:
            raise _UnusableError("no label" if value is None else "a label that the run does not have")
        return found

    return read


def _number_of(column: str, names: Sequence[str] | None, labels: Sequence[str]) -> Reader:
    def read(value: Any) -> float:
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST:
            raise _UnusableError("no finite number")
        return number

    return read


_TARGETS: Mapping[str, Callable[[str, Sequence[str] | None, Sequence[str]], Reader]] = {
    "classification": _class_of,
    "regression": _number_of,
}


def _say(unusable: Mapping[int, str], of: int) -> None:
    if unusable:
        count = len(unusable)
        said = [f"row {place + 1}: {why}" for place, why in list(unusable.items())[:MOST_SAID]]
        LOG.warning(
            "%d of %d rows cannot be used and take part without a loss (%s%s)", count, of, "; ".join(said), " …" * (count > MOST_SAID)
        )
