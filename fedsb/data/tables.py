"""Tables out of local files: of what a file holds, only the columns that the configuration names are read.

What stands in another column, of whatever kind, cannot stop a run. Nothing is written: no cache, no lock beside somebody's data.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data.instructions import columns_of

# The longer mark first: UTF-32's begins with UTF-16's.
BYTE_ORDER_MARKS: Mapping[bytes, str] = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SEPARATORS = (",", ";", "\t", "|")
HEADER = 1 << 20  # characters within which a header ends
MOST_DIGITS = 4000  # Python reads no whole number of more than 4300


class Rows(Protocol):
    """Rows by column, as :class:`Table` and ``datasets.Dataset`` have them."""

    @property
    def column_names(self) -> Sequence[str]:
        """All names, one that stands twice twice."""

    @property
    def features(self) -> Mapping[str, Any]:
        """What is known of a column, such as a ``ClassLabel``; it may leave columns out."""

    def __len__(self) -> int: ...

    def __getitem__(self, column: str, /) -> Any: ...


@dataclass(frozen=True)
class Table:
    """The rows of a file.

    Attributes:
        column_names: of all columns, one that stands twice twice.
        values: of the columns that were asked for and stand there once, a value a row; None where a row has none.
        num_rows: number of rows.
        features: see :class:`Rows`.
    """

    column_names: Sequence[str]
    values: Mapping[str, Sequence[Any]]
    num_rows: int
    features: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, column: str) -> Sequence[Any]:
        return self.values[column]


def class_names(rows: Rows, column: str) -> tuple[str, ...] | None:
    """Return the names of a column's classes, in order, where it is a ``datasets.ClassLabel``."""
    # Of all kinds of columns that alone has names; its class would take a second to import in each process.
    names = getattr(rows.features.get(column), "names", None)
    return None if names is None else tuple(names)


def named_columns(cfg: DataConfig, owner_column: str | None = None) -> frozenset[str]:
    """Return the columns that the configuration names."""
    texts = (cfg.text,) if isinstance(cfg.text, str) else cfg.text or ()
    label = cfg.label if cfg.task != "causal_lm" else None
    return frozenset(column for column in (*texts, *columns_of(cfg), label, owner_column) if column)


def decoded(path: Path, encoding: str | None = None) -> str:
    """Read a text file: by its byte order mark, else as ``encoding``, else as UTF-8, which no other encoding looks like by chance.

    Raises:
        UserError: it is something else, or there is no such encoding.
    """
    raw = path.read_bytes()
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)
    try:
        text = raw.decode(marked or encoding or "utf-8")
    except LookupError:
        raise UserError(f"data.encoding={encoding} is no encoding; use utf-8, utf-16, cp1252, latin-1 or another of Python's") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not {marked or encoding or 'UTF-8'} (line {line}, byte 0x{raw[error.start]:02x}); save it as UTF-8 "
            "('CSV UTF-8' in Excel), or say what it is, as in data.encoding=cp1252 (Windows, Western Europe)"
        ) from None
    if "\0" in text:
        raise UserError(f"{path} holds zero bytes, as UTF-16 without its mark does; save it as UTF-8, or add data.encoding=utf-16-le")
    return text


def read_csv(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    """Read rows with a header. Every value is a text as it is written ("None", "NA" and "007" too); an empty one is None.

    The separator is the one out of :data:`SEPARATORS` at which the header falls into the columns that are asked for.

    Raises:
        UserError: see :func:`decoded`.
        ValueError: a row has more fields than the header, or a quote is not closed.
    """
    text = decoded(path, cfg.encoding)
    first, _, rest = text.partition("\n")
    said = first.strip().removeprefix("sep=")  # Excel's own line
    if first.startswith("sep=") and len(said) <= 1:
        return _columns(_records(rest, said or "\t"), wanted)
    own = ("\t",) if path.suffix.lower() == ".tsv" else ()
    return _columns(_records(text, separator_of(text[:HEADER], wanted, (*own, *SEPARATORS))), wanted)


def separator_of(start: str, wanted: Collection[str], candidates: Sequence[str]) -> str:
    """Return the first separator by which the header has all that is wanted; else the one that makes most columns of it."""

    def fit(separator: str) -> tuple[bool, int]:
        try:
            header = next(_records(start, separator), [])
        except ValueError:
            return False, 0
        return set(wanted) <= set(header), len(header)

    return max(candidates, key=fit)


def _records(text: str, separator: str) -> Iterator[list[str]]:
    """Yield the rows that are not blank."""
    csv.field_size_limit(sys.maxsize)
    # Line feeds inside of quotes stay as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        yield from (record for record in reader if record)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None


def _columns(records: Iterator[list[str]], wanted: Collection[str]) -> Table:
    names = next(records, [])
    places = {name: names.index(name) for name in wanted if names.count(name) == 1}
    values: dict[str, list[str | None]] = {name: [] for name in places}
    count = 0
    for count, record in enumerate(records, start=1):
        if any(beyond.strip() for beyond in record[len(names) :]):
            raise ValueError(f"row {count} has {len(record)} fields, the header {len(names)}")
        for name, place in places.items():
            values[name].append(record[place] or None if place < len(record) else None)
    return Table(names, values, count)


def read_json(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    """Read an array of objects, or an object a line.

    Raises:
        UserError: see :func:`decoded`.
        ValueError: something else is there.
    """
    rows = list(_objects(decoded(path, cfg.encoding)))
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: every row must be an object with named columns")
    repeated = dict.fromkeys(name for row in rows if isinstance(row, _Repeating) for name in row.repeated)
    names = [*dict.fromkeys(name for row in rows for name in row), *repeated]
    values = {name: [row.get(name) for row in rows] for name in wanted if names.count(name) == 1}
    return Table(names, values, len(rows))


class _Repeating(dict[str, Any]):
    """An object in which a name stands twice."""

    repeated: Collection[str] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating, names = _Repeating(found), [name for name, _ in pairs]
    repeating.repeated = [name for name in found if names.count(name) > 1]
    return repeating


def _objects(text: str) -> Iterator[Any]:
    if text.lstrip().startswith("["):
        yield from parsed(text)
        return
    # Not splitlines(): a JSON string may hold a bare U+2028, which that would cut at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield parsed(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def parsed(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is none, or too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=lambda digits: int(digits) if len(digits) < MOST_DIGITS else digits)
    except RecursionError:
        raise ValueError("lists or objects lie too deep in each other") from None


def read_parquet(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    """Read a Parquet file; names of classes that ``datasets`` has left in it are kept."""
    # It takes a second to import, and most processes read no such file.
    import datasets

    # By itself: a reader of data sets would take columns out of a path such as label=3/rows.parquet.
    with pyarrow.parquet.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        held = datasets.Dataset(file.read(columns=[name for name in wanted if names.count(name) == 1]))
        values = {name: list(held[name]) for name in held.column_names}
        return Table(names, values, file.metadata.num_rows, held.features)


Reader = Callable[[Path, DataConfig, Collection[str]], Table]
READERS: Mapping[str, Reader] = {
    ".csv": read_csv,
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".tsv": read_csv,
}
EXPORTS: Mapping[str, str] = dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), "; save the sheet as CSV UTF-8")


def read_table(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    """Read the wanted columns of a file by its suffix.

    Raises:
        UserError: an unknown suffix, an empty file, or one that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path} is not a table that can be read; give one of {', '.join(READERS)}{EXPORTS.get(suffix, '')}")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty; give a file with a row for each example")
    try:
        return READERS[suffix](path, cfg, wanted)
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as {suffix} ({one_line(error)}); correct the file or its suffix") from error


def one_line(error: BaseException) -> str:
    """Return what an error says in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
