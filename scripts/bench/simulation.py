"""What a simulated round costs, ours beside others at the same work: the same model, examples, batches, steps and threads. Needs ``dev``.

Run as ``python scripts/bench/simulation.py [--quick] [--out FOLDER]`` on an installed project; the whole takes an hour. Each contestant
is a process of its own that does a round when it is told to, and those that are compared take turns, round by round, so that a busy
machine slows all alike. CPU seconds are those of the whole tree of processes; memory (its proportional set size: pages that several share
count once) and the time to start are taken while a contestant is by itself. The opponents live in ``scripts/bench/contest``: a loop over
one PEFT model, the same with Opacus, pfl 0.6.0, and a Flower app that loads its model for each message. Each kind has an environment of
its own, which this script makes from PyPI, with torch and the rest as they are here. Figures go to ``simulation.json`` and
``simulation.png`` in FOLDER, as far as they are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from contest import scale
from contest.contestants import HEATS, Starts
from contest.heats import WARM, Contest, compared, run_heats
from contest.plot import draw
from contest.workload import Shape, write_workload
from figures import Figure, show

# With rounds of each, those that warm up apart: those of a large shape take minutes, and vary less.
SHAPES = {Shape(batch=4, tokens=32): 6, Shape(batch=16, tokens=64): 2}


def main() -> int:
    """Measure, print the table, write JSON and plot; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of one shape")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], choices=[4, 16], help="shapes, by their batch")
    parser.add_argument(
        "--heats", nargs="+", default=list(HEATS), choices=HEATS, help="of contestants; the rest is measured with all of them"
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of simulation.json and simulation.png")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "fedsb-opponents", help="of the opponents")
    options = parser.parse_args()
    figures: list[Figure] = []
    tables: dict[str, Contest] = {}
    asked = {shape: rounds for shape, rounds in SHAPES.items() if shape.batch in options.batches}
    for shape, rounds in list(asked.items())[: 1 if options.quick else None]:
        tables[shape.name] = contest(shape, 2 if options.quick else rounds, options.environments, options.heats)
        figures += map(show, compared(shape, tables[shape.name]))
        save(tables, figures, options.out)
    for figure in scale.figures(options.quick) if set(options.heats) == set(HEATS) else ():
        figures.append(show(figure))
        save(tables, figures, options.out)
    return 0 if all(figure.holds for figure in figures) else 1


def save(tables: Mapping[str, Contest], figures: Sequence[Figure], folder: Path) -> None:
    """Write what there is: the whole takes an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"contests": {shape: asdict(contest) for shape, contest in tables.items()}, "figures": [f.as_json() for f in figures]}
    (folder / "simulation.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(tables, folder / "simulation.png")


def contest(shape: Shape, rounds: int, environments: Path, names: Sequence[str]) -> Contest:
    """Let all do their rounds, heat by heat, and print the table."""
    print(f"\n{shape.name}: 8 clients, {shape.steps} steps each a round, LoRA r={shape.rank}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        most = rounds + max(WARM.values()) + 1  # nobody comes to the last: one that is over, and ends, would disturb the others
        work = write_workload(Path(folder) / "plain.json", shape, most, private=False)
        private = write_workload(Path(folder) / "private.json", shape, most, private=True)
        starts = Starts(work, private, environments)
        found = run_heats({name: HEATS[name](starts) for name in names}, rounds)
    width = max(map(len, found.alone))
    print(f"{'':<{width}}  CPU s  wall s  PSS MB  start-up s", flush=True)
    for name, done, alone in found.rows():
        print(
            f"{name:<{width}}  {median(done.cpu_s):5.2f}  {median(done.wall_s):6.2f}  {alone.pss_mb:6.0f}  {alone.startup_s:10.1f}",
            flush=True,
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
