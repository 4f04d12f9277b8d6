"""Seconds until a federation's first training message, ours beside a Flower app that loads its model for each message. Needs ``dev``.

Run as ``python scripts/bench/startup.py [--starts 5] [--only NAME …]`` on an installed project. Every contestant is started anew so many
times, in turns, and says when the model, the data and the federation are there and the first training messages are the next thing; the
seconds until its first round is over are measured too, for a contestant with workers may have started none of them by then. The first turn
fills the caches of the disk and does not count. The opponent's environment is made from PyPI once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import cast

from contest.contest import Contestant, Start
from contest.contestants import APP, FLWR, LOCAL, RAY, Starts
from contest.workload import Shape, write_workload
from figures import Figure, show

BOUNDS: Mapping[str, float] = {LOCAL: 0.8, RAY: 1.0, FLWR: 1.2}
FIRST, OVER = "seconds to the first training message", "seconds to the end of the first round"


def main() -> int:
    """Measure, print the seconds of every start and the ratios; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--starts", type=int, default=5, help="that count, of each")
    parser.add_argument("--only", nargs="+", default=list(BOUNDS), choices=list(BOUNDS))
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "fedsb-opponents", help="of the opponent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = write_workload(Path(folder) / "work.json", Shape(batch=4, tokens=32), 2, private=False)
        heat = Starts(work, work, options.environments).flower()
        found = started({name: cast(Start, heat[name]) for name in (APP, *options.only)}, options.starts)
    figures = list(map(show, ratios(found)))
    return 0 if all(figure.holds for figure in figures) else 1


def started(starts: Mapping[str, Start], times: int) -> dict[str, list[tuple[float, float]]]:
    """Start each in turns and return the seconds to its first message and to the end of its first round."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    for turn in range(times + 1):
        for name, start in starts.items():
            begun = time.monotonic()
            with closing(start()) as contestant:
                assert isinstance(contestant, Contestant)
                contestant.warm_up()
                seconds = contestant.startup_s, time.monotonic() - begun
            if turn:
                found[name].append(seconds)
                print(f"{turn}  {name:<24} {seconds[0]:5.1f}  {seconds[1]:5.1f}", flush=True)
    return found


def ratios(found: Mapping[str, Sequence[tuple[float, float]]]) -> list[Figure]:
    """Return the medians of the ratios turn by turn, each with the least and the largest."""
    figures = []
    for name in filter(BOUNDS.__contains__, found):
        for which, (what, bound) in enumerate(((FIRST, BOUNDS[name]), (OVER, None))):
            each = [mine[which] / theirs[which] for mine, theirs in zip(found[name], found[APP], strict=True)]
            spread = f"({min(each):.2f} to {max(each):.2f})"
            figures.append(Figure(f"{name}: {what} over the Flower app's {spread}", median(each), bound))
    return figures


if __name__ == "__main__":
    sys.exit(main())
