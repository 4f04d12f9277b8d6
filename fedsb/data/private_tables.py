"""Tables of which no row can break another: what a row of a real node's file holds decides its own place and nothing else.

A row that cannot be read is there, with no value. A row is a line of a .jsonl file (a blank one too), a line of a .csv file below its
header, or a row of a .parquet file. A .json array is one document, which a single row can break, so it is not read; nor is a cell of a .csv
that goes over several lines: a quote that one row does not close would take others with it.
"""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow
import pyarrow.parquet

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data.tables import BYTE_ORDER_MARKS, HEADER, SEPARATORS, Rows, Table, parsed, separator_of

if TYPE_CHECKING:
    import datasets

LOG = logging.getLogger(__name__)
WIDE = ("utf-16", "utf-32")  # more than a byte a character
MOST_SAID = 20


def read_private_table(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    """Read the wanted columns of a file row by row.

    Args:
        path: the file.
        cfg: names the columns, and the encoding where a file does not mark its own.
        wanted: columns to keep; none of them to count the rows.

    Raises:
        UserError: an unknown suffix or encoding, or a file that is not there.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        one = "; an array of objects is one document, which one row can break: write a row a line (.jsonl)" if suffix == ".json" else ""
        raise UserError(f"{path} cannot be read under privacy.unit=example; give one of {', '.join(READERS)}{one}")
    try:
        return READERS[suffix](path, cfg, wanted)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read as {suffix} ({type(error).__name__})") from error


@dataclass(frozen=True)
class _Lines:
    """Lines as the file itself ends them: what belongs to which row is a matter of its bytes, and of nothing that a configuration says.

    Attributes:
        lines: with their ends; in a file that does not mark its encoding each byte is a character, and every sign of the format is itself.
        told: turns a line, or a value out of one, into text; None where it is none.
    """

    lines: list[str]
    told: Callable[[str], str | None]


def _lines(path: Path, encoding: str | None) -> _Lines:
    """Return the lines; bytes that are no text of the encoding are replaced, which spoils their own line alone."""
    raw = path.read_bytes()
    mark, marked = next(((mark, name) for mark, name in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), (b"", None))
    if marked in WIDE:
        return _Lines(_ended(raw.decode(marked, errors="replace")), str)
    said = "utf-8" if marked else encoding or "utf-8"
    _hold_line_ends(said)
    return _Lines(_ended(raw.removeprefix(mark).decode("latin-1")), partial(_decoded, said))


def _ended(text: str) -> list[str]:
    # Not splitlines(): a text may hold a bare U+2028, which that would cut at.
    lines = [f"{line}\n" for line in text.split("\n")]
    return lines if text and not text.endswith("\n") else lines[:-1]


def _hold_line_ends(encoding: str) -> None:
    """Hold that a line ends where the byte of a line feed stands: by another encoding the server would count what stands in the texts.

    Raises:
        UserError: it does not.
    """
    try:
        ends = b"\n".decode(encoding, errors="replace") == "\n"
    except LookupError:
        raise UserError(f"data.encoding={encoding} is no encoding; use utf-8, cp1252, latin-1 or another of Python's") from None
    except ValueError:
        ends = False
    if not ends:
        raise UserError(
            f"data.encoding={encoding} ends lines otherwise than by one byte, which under privacy.unit=example a file must say itself: "
            "save it as UTF-8, or as UTF-16 with its mark"
        )


def _decoded(encoding: str, text: str) -> str | None:
    try:
        return text.encode("latin-1").decode(encoding, errors="replace")
    except (ValueError, OverflowError):
        return None


def _read_jsonl(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    found = _lines(path, cfg.encoding)
    rows = [_object(found.told(line)) for line in found.lines] if wanted else []
    return Table(tuple(wanted), {name: [row.get(name) for row in rows] for name in wanted}, len(found.lines))


def _object(line: str | None) -> Mapping[str, Any]:
    try:
        found = parsed(line or "")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _read_csv(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    csv.field_size_limit(sys.maxsize)
    found = _lines(path, cfg.encoding)
    lines = found.lines
    said = lines[0].strip().removeprefix("sep=") if lines and lines[0].startswith("sep=") else None  # Excel's own line
    if said is not None and len(said) <= 1:
        lines, separator = lines[1:], said or "\t"
    else:
        own = ("\t",) if path.suffix.lower() == ".tsv" else ()
        # By the first line alone. What is asked for has no say: the server would choose where the cells of a text end.
        separator = separator_of("".join(lines[:1])[:HEADER], (), (*own, *SEPARATORS))
    names = [found.told(name) or "" for name in (_record(lines[0], separator) if lines else None) or []]
    places = {name: names.index(name) for name in wanted if names.count(name) == 1}
    read = [_record(line, separator) for line in lines[1:]]
    _say_open(path, [i + 1 for i, record in enumerate(read) if record is None])
    records = [record if record and not any(beyond.strip() for beyond in record[len(names) :]) else [] for record in read]
    values = {
        name: [found.told(record[place]) or None if place < len(record) else None for record in records] for name, place in places.items()
    }
    return Table(names, values, len(records))


def _record(line: str, separator: str) -> list[str] | None:
    """Return the record of a line; None where it ends inside of quotes, or is none."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True))
    except (csv.Error, StopIteration):
        return None


def _say_open(path: Path, rows: Sequence[int]) -> None:
    """Name the rows whose line is no record: its text may go over several lines, which nothing but its operator can tell."""
    if rows:
        said = ", ".join(map(str, rows[:MOST_SAID])) + " …" * (len(rows) > MOST_SAID)
        remedy = "under privacy.unit=example a row of a .csv is one line; keep texts that hold line feeds as .jsonl or .parquet"
        LOG.warning("%s: the lines of %d rows end inside of quotes (%s): %s", path, len(rows), said, remedy)


def _read_parquet(path: Path, cfg: DataConfig, wanted: Collection[str]) -> Table:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        if not wanted:
            return Table(names, {}, file.metadata.num_rows)
        return of_arrow(file.read(columns=[name for name in wanted if names.count(name) == 1]), names)


def of_arrow(table: pyarrow.Table, names: Sequence[str]) -> Table:
    """Return the values of an Arrow table one by one, and what its schema says of them.

    Args:
        table: the columns that are read.
        names: of all columns.
    """
    # It takes a second to import, and most processes read no such file.
    import datasets

    values = {name: list(_values(table.column(name))) for name in table.column_names}
    return Table(names, values, table.num_rows, datasets.Features.from_arrow_schema(table.schema))


def _values(column: Iterable[Any]) -> Iterator[Any]:
    for scalar in column:
        try:
            yield scalar.as_py()
        except (ValueError, OverflowError, pyarrow.ArrowException):
            yield None


READERS: Mapping[str, Callable[[Path, DataConfig, Collection[str]], Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tsv": _read_csv,
}


def private_table(rows: Rows, wanted: Collection[str]) -> Table:
    """Return rows that came as ``save_to_disk`` keeps them, as a table; others are one already."""
    if isinstance(rows, Table):
        return rows
    saved = cast("datasets.Dataset", rows)
    held = saved.select_columns([name for name in rows.column_names if name in wanted])
    return Table(rows.column_names, {}, len(rows)) if not held.column_names else of_arrow(held.with_format("arrow")[:], rows.column_names)
