"""The cells that are kept of the runs behind the tables of language models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedsb.run.folder import read_run

from .cells import CONTESTANTS, SEEDS, cell, finished, lost
from .rows import cell_of, row_of


def key_of(table: str, contestant: str, seed: int) -> str:
    """Return the name of a cell in the cache."""
    return f"{table}/{cell(contestant, seed)}"


def keep(cache: Path, table: str, folder: Path) -> None:
    """Put what runs of a folder have ended with into the cache."""
    known = kept(cache)
    places = {key: folder / cell(c, s) for c in CONTESTANTS for s in SEEDS if (key := key_of(table, c, s)) not in known}
    ended = {key: path for key, path in places.items() if finished(path)}
    for key, path in ended.items():
        if why := lost(path):
            print(f"{key}: no cell, {why}")
    new = {key: cell_of(read_run(path)) for key, path in ended.items() if not lost(path)}
    if new:
        draft = cache.with_name(f"{cache.name}.{os.getpid()}")
        draft.write_text(json.dumps(dict(sorted((known | new).items())), indent=1) + "\n")
        draft.replace(cache)


def rows_of(table: str, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each contestant that has a cell."""
    for contestant in CONTESTANTS:
        if cells := {seed: known[key] for seed in SEEDS if (key := key_of(table, contestant, seed)) in known}:
            yield row_of(contestant, cells)


def kept(path: Path) -> dict[str, Any]:
    """Return the cells that a file holds."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
