"""Accuracy of Fed-SB after each round, by start: the default federation for three seeds. Needs the `demo` extra.

Run as ``python scripts/bench/accuracy.py [--cache PATH] [overrides…]`` on an installed project; about 4 minutes of CPU time a run,
nine runs. Finished runs are kept in the cache file, so a killed script goes on where it was; other overrides count as other runs.
Exit status 1 if the gradient start is not 5 points ahead of the others after round 1, or ends below 0.92.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from figures import Figure, show

from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.run.folder import read_run
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve

STARTS = ("gradient", "weight_svd", "orthogonal")
SEEDS = (0, 1, 2)
CACHE = Path("accuracy.json")
Accuracies = Mapping[str, list[list[float]]]


def main() -> int:
    """Run what is not in the cache yet, and print the table."""
    options = parse()
    warnings.filterwarnings("ignore")
    results = [show(figure) for figure in measure(options.cache, options.seeds, options.overrides)]
    return 0 if all(figure.holds for figure in results) else 1


def by_start(quick: bool) -> list[Figure]:
    """Measure all of it for ``core.py``, or one seed."""
    return measure(CACHE, SEEDS[: 1 if quick else None], ())


def measure(path: Path, seeds: Sequence[int], overrides: Sequence[str]) -> list[Figure]:
    """Run what is not in the cache yet, print the table and return the figures."""
    cache = Cache(path)
    table: dict[str, list[list[float]]] = {start: [] for start in STARTS}
    for seed in seeds:
        for start in STARTS:
            run = [*overrides, "method=fed_sb", f"init.kind={start}", f"seed={seed}"]
            accuracies = cache.get(run) or cache.put(run, federate(run))
            table[start].append(accuracies)
            print(f"seed {seed}, {start}: " + " ".join(f"{a:.3f}" for a in accuracies), flush=True)
    print_table(table)
    return figures(table)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="PATH", help="finished runs are kept here")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="SEED")
    parser.add_argument("overrides", nargs="*", help="of the configuration, for a smaller federation")
    return parser.parse_intermixed_args()


class Cache:
    """Accuracies after each round, by the overrides of the run, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, overrides: Sequence[str]) -> list[float] | None:
        """Return what is known of a run."""
        return self._known.get(shlex.join(overrides))

    def put(self, overrides: Sequence[str], accuracies: list[float]) -> list[float]:
        """Keep a finished run; the file is replaced whole."""
        self._known[shlex.join(overrides)] = accuracies
        draft = self._path.with_name(f"{self._path.name}.tmp")
        draft.write_text(json.dumps(self._known, indent=2) + "\n")
        draft.replace(self._path)
        return accuracies


def federate(overrides: Sequence[str]) -> list[float]:
    """Run a federation in this process and return the accuracy after each round, the start first."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        grid = LocalGrid.simulation(app, {"overrides": shlex.join(overrides)})
        serve(load(list(overrides)), grid, folder)
        return [record.metrics["accuracy"] for record in read_run(folder).records]


def print_table(table: Accuracies) -> None:
    """Print mean and standard error over the seeds, a row a start and a column a round."""
    rounds = range(len(table[STARTS[0]][0]))
    print("\n" + "start".ljust(12) + "".join(f"round {number}".rjust(16) for number in rounds))
    for start, runs in table.items():
        columns = list(zip(*runs, strict=True))
        print(start.ljust(12) + "".join(f"{mean(c):.3f} ± {standard_error(c):.3f}".rjust(16) for c in columns))
    print()


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def figures(table: Accuracies) -> list[Figure]:
    """Return the promised lead after round 1 and the final accuracy."""
    after = {start: mean(run[1] for run in runs) for start, runs in table.items()}
    leads = [
        Figure(f"lead of the gradient start over {start} after round 1, points", 100 * (after["gradient"] - after[start]), 5.0, True)
        for start in STARTS[1:]
    ]
    return [*leads, Figure("final accuracy of the gradient start", mean(run[-1] for run in table["gradient"]), 0.92, True)]


if __name__ == "__main__":
    sys.exit(main())
