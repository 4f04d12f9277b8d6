"""Examples as a file, which the same configuration reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedsb.config.schema import DataConfig
from fedsb.data.examples import Examples, text_columns
from fedsb.data.instructions import way_of


def write_rows(path: Path, examples: Examples, cfg: DataConfig, *, labels: Sequence[str]) -> None:
    """Write examples as JSON lines, under the column names that ``cfg`` reads them back by."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in _rows(examples, cfg, labels))


def _rows(examples: Examples, cfg: DataConfig, labels: Sequence[str]) -> Iterator[object]:
    if way_of(cfg):
        yield from map(json.loads, examples.texts)
        return
    columns: dict[str, Sequence[object]] = dict(zip(filter(None, text_columns(cfg)), [examples.texts, examples.pairs or ()], strict=False))
    if examples.targets is not None and cfg.label is not None:
        columns[cfg.label] = [labels[int(target)] for target in examples.targets] if labels else examples.targets
    yield from (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
