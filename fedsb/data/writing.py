"""Examples as a file, which the same configuration reads back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedsb.config.schema import DataConfig
from fedsb.data.examples import Examples


def write_rows(path: Path, examples: Examples, cfg: DataConfig, *, labels: Sequence[str]) -> None:
    """Write examples as JSON lines, under the column names that ``cfg`` reads them back by."""
    names = [cfg.text] if isinstance(cfg.text, str) else list(cfg.text)
    columns: dict[str, Sequence[object]] = dict(zip(names, [examples.texts, examples.pairs or ()], strict=False))
    if examples.targets is not None and cfg.label is not None:
        columns[cfg.label] = [labels[int(target)] for target in examples.targets] if labels else examples.targets
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in zip(*columns.values(), strict=True))
