"""A language model fine-tuned by every method, and by one client that holds all: tables of response loss and of exact match.

Run as ``python scripts/bench/language.py FOLDER [--table gsm8k sums] [--cache FILE] [--minutes M]`` on an installed project with the extra
``llm``. Each cell is a run of SmolLM2 in bfloat16, some 10 to 30 minutes of one core. What is in the cache is not run again; a script that
is ended goes on with the runs in the folder where they were, and several may share both. A run that lost a reply is no cell: it is said and
run again. GSM8K is looked for in ../shared/data/gsm8k; where it is not, its cells are those of the cache. Settings are those that each
method ships with: none was tuned on these data. Exit status 1 if a bound fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from answering.cache import keep, kept, key_of, rows_of
from answering.cells import CONTESTANTS, SEEDS, SHARED, TABLES, Table, cell, fill
from answering.rows import gains_of, markdown
from figures import Figure, show


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


if __name__ == "__main__":
    sys.exit(main())
