"""A language model fine-tuned by every method, and by one client that holds all: tables of response loss and of exact match.

Run as ``python scripts/bench/language.py FOLDER [--table gsm8k sums] [--minutes M]`` on an installed project with the extra ``llm``. Each
cell is a run of SmolLM2 in bfloat16, some 10 to 30 minutes of one core. A script that is ended goes on where it was, several may share a
folder, and finished runs are read, not run. GSM8K is looked for in ../shared/data/gsm8k and its table passed over where it is not. Settings
are those that each method ships with: none was tuned on these data. Exit status 1 if a bound fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import Figure, show
from language_cells import CONTESTANTS, SEEDS, SHARED, TABLES, Table, cell, fill, finished
from language_rows import gains_of, markdown, row_of

from fedsb.run.folder import read_run


def main() -> int:
    """Run what is missing, print the tables, and hold them against their bounds."""
    options = parse()
    deadline = time.monotonic() + 60 * options.minutes
    held = True
    for name in options.table:
        table, folder = TABLES[name], options.folder.resolve() / name
        if table.needs is not None and not table.needs.is_dir():
            print(f"{name}: passed over, {table.needs} is not here")
            continue
        for seed in SEEDS:
            for contestant in options.only:
                if time.monotonic() < deadline:
                    fill(folder / cell(contestant, seed), [*table.overrides, *SHARED, *CONTESTANTS[contestant], f"seed={seed}"])
        found = {c: [read_run(folder / cell(c, s)) for s in SEEDS if finished(folder / cell(c, s))] for c in CONTESTANTS}
        rows = [row_of(contestant, runs) for contestant, runs in found.items() if runs]
        print(f"\n{name}, {len(SEEDS)} seeds\n\n{markdown(rows)}\n")
        if options.json:
            options.json.write_text(json.dumps(kept(options.json) | {name: rows}, indent=1) + "\n")
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
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    return parser.parse_args()


def bounds(table: Table, rows: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Yield what must have been gained, of the seed that gained least."""
    for row in rows:
        if row["contestant"] in table.gains:
            yield Figure(f"{row['contestant']}, nats below untouched", min(gains_of(row)), table.gains[row["contestant"]], at_least=True)


def kept(path: Path) -> dict[str, Any]:
    """Return the tables that a file holds."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


if __name__ == "__main__":
    sys.exit(main())
