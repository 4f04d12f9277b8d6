"""A language model fine-tuned by every method, and by one client that holds all: tables of response loss and of exact match.

Run as ``python scripts/bench/language.py FOLDER [--table gsm8k sums] [--cache FILE] [--minutes M]`` on an installed project with the extra
``llm``. Each cell is a run of SmolLM2 in bfloat16, some 10 to 30 minutes of one core. What is in the cache is not run again; a script that
is ended goes on with the runs in the folder where they were, and several may share both. GSM8K is looked for in ../shared/data/gsm8k; where
it is not, its cells are those of the cache. Settings are those that each method ships with: none was tuned on these data. Exit status 1 if
a bound fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, show
from language_cells import CONTESTANTS, SEEDS, SHARED, TABLES, Table, cell, fill, finished
from language_rows import cell_of, gains_of, markdown, row_of

from fedsb.run.folder import read_run


def main() -> int:
    """Run what is missing, print the tables, and hold them against their bounds."""
    options = parse()
    deadline = time.monotonic() + 60 * options.minutes
    held = True
    for name in options.table:
        table, folder = TABLES[name], options.folder.resolve() / name
        here = table.needs is None or table.needs.is_dir()
        if not here:
            print(f"{name}: nothing is run, {table.needs} is not here")
        for seed in SEEDS:
            for contestant in options.only:
                if here and time.monotonic() < deadline and key_of(name, contestant, seed) not in kept(options.cache):
                    fill(folder / cell(contestant, seed), [*table.overrides, *SHARED, *CONTESTANTS[contestant], f"seed={seed}"])
                    keep(options.cache, name, folder)
        keep(options.cache, name, folder)
        rows = list(rows_of(name, kept(options.cache)))
        print(f"\n{name}: {sum(len(row['bytes']) for row in rows)} of {len(SEEDS) * len(CONTESTANTS)} cells\n\n{markdown(rows)}\n")
        shown = [show(figure) for figure in bounds(table, rows)]
        held &= all(figure.holds for figure in shown)
    return 0 if held else 1


def key_of(table: str, contestant: str, seed: int) -> str:
    """Return the name of a cell in the cache."""
    return f"{table}/{cell(contestant, seed)}"


def keep(cache: Path, table: str, folder: Path) -> None:
    """Put what runs of a folder have ended with into the cache."""
    ended = {key_of(table, c, s): folder / cell(c, s) for c in CONTESTANTS for s in SEEDS if finished(folder / cell(c, s))}
    known = kept(cache)
    new = {key: cell_of(read_run(path)) for key, path in ended.items() if key not in known}
    if new:
        draft = cache.with_name(f"{cache.name}.{os.getpid()}")
        draft.write_text(json.dumps(dict(sorted((known | new).items())), indent=1) + "\n")
        draft.replace(cache)


def rows_of(table: str, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each contestant that has a cell."""
    for contestant in CONTESTANTS:
        if cells := [known[key] for seed in SEEDS if (key := key_of(table, contestant, seed)) in known]:
            yield row_of(contestant, cells)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the runs are, and go")
    parser.add_argument("--table", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--cache", type=Path, default=Path("bench_language.json"), metavar="FILE", help="finished cells")
    return parser.parse_args()


def bounds(table: Table, rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Yield what must have been gained, of the seed that gained least."""
    for row in rows:
        if row["contestant"] in table.gains:
            yield Figure(f"{row['contestant']}, nats below untouched", min(gains_of(row)), table.gains[row["contestant"]], at_least=True)


def kept(path: Path) -> dict[str, Any]:
    """Return the cells that a file holds."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
