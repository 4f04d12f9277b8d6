"""What a simulated round costs, ours beside others at the same work: the same model, examples, batches, steps and threads. Needs ``dev``.

Run as ``python scripts/bench_simulation.py [--quick] [--out FOLDER]`` on an installed project. Each contestant is a process of its own that
does a round when it is told to, and all (those with privacy apart) take turns, round by round, so that a busy machine slows all alike. CPU
seconds are those of the whole tree of processes; memory is its proportional set size (shared pages count once). The opponents live in
``scripts/simulation``: a loop over one PEFT model, the same with Opacus, pfl 0.6.0, and a Flower app that loads its model for each
message. The last two have environments that this script makes from PyPI; the loops need nothing beyond the extra `dev`. Figures go to
``simulation.json`` and ``simulation.png`` in FOLDER, as far as they are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench_figures import Figure, show
from simulation import scale
from simulation.contest import Measured, slowed_by_company, take_turns
from simulation.environments import environment
from simulation.plot import draw
from simulation.workload import Shape, with_trainer, write_workload

# With rounds of each, the one that warms up included: those of a large shape take minutes, and vary less.
SHAPES = {Shape(batch=4, tokens=32): 7, Shape(batch=16, tokens=64): 4}


def main() -> int:
    """Measure, print the table, write JSON and plot; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds of one shape")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="shapes, by their batch")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of simulation.json and simulation.png")
    parser.add_argument("--environments", type=Path, default=Path(tempfile.gettempdir()) / "fedsb-opponents", help="of the opponents")
    options = parser.parse_args()
    figures: list[Figure] = []
    tables: dict[str, dict[str, Measured]] = {}
    asked = {shape: rounds for shape, rounds in SHAPES.items() if shape.batch in options.batches}
    for shape, rounds in list(asked.items())[: 1 if options.quick else None]:
        tables[shape.name], company = contest(shape, 3 if options.quick else rounds, options.environments)
        figures += [*compare(shape, tables[shape.name]), show(company)]
        save(tables, figures, options.out)
    for figure in scale.figures(options.quick):
        figures.append(show(figure))
        save(tables, figures, options.out)
    return 0 if all(figure.holds for figure in figures) else 1


def save(tables: Mapping[str, Mapping[str, Measured]], figures: Sequence[Figure], folder: Path) -> None:
    """Write what there is: the whole takes an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {shape: {name: asdict(row) for name, row in table.items()} for shape, table in tables.items()}
    (folder / "simulation.json").write_text(json.dumps({"table": rows, "figures": [f.as_json() for f in figures]}, indent=2) + "\n")
    draw(tables, folder / "simulation.png")


def heats(work: Path, private: Path, environments: Path) -> list[dict[str, Sequence[str]]]:
    """Return the command of each contestant, those without privacy first; all at once would not fit into 24 GB at the large shape."""
    flower, trainer = environment("flower", environments), with_trainer(work)
    ours, loop = [sys.executable, "-m", "simulation.ours"], [sys.executable, "-m", "simulation.peft_loop"]
    plain: dict[str, Sequence[str]] = {
        "PEFT loop": [*loop, str(work)],
        "pfl 0.6.0": [str(environment("pfl", environments)), "-m", "simulation.pfl_loop", str(work)],
        "ours, local": [*ours, str(work)],
        "ours, stack of 8": [*ours, str(work), "runtime.stack=8"],
        "ours, ray, 2 workers": [*ours, str(work), "runtime=ray", "runtime.workers=2", "runtime.cpus=0.5"],
        "Flower app, plain loop": [str(flower), "-m", "simulation.flower_rounds", "vanilla_flower", str(work)],
        "Flower app, HF Trainer": [str(flower), "-m", "simulation.flower_rounds", "vanilla_flower", str(trainer)],
        "ours, flwr run": [sys.executable, "-m", "simulation.flower_rounds", "ours_flower", str(work)],
    }
    return [plain, {
        "PEFT + Opacus loop": [*loop, str(private), "--private"],
        "ours, private": [*ours, str(private)],
        "ours, private, stack of 8": [*ours, str(private), "runtime.stack=8"],
    }]  # fmt: skip


def contest(shape: Shape, rounds: int, environments: Path) -> tuple[dict[str, Measured], Figure]:
    """Let all do their rounds in turns; and say what two processes at once cost each other, which bounds what two workers can reach."""
    print(f"\n{shape.name}: 8 clients, {shape.steps} steps each a round, LoRA r={shape.rank}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = write_workload(Path(folder) / "plain.json", shape, rounds, private=False)
        private = write_workload(Path(folder) / "private.json", shape, rounds, private=True)
        table = {name: row for heat in heats(work, private, environments) for name, row in take_turns(heat, rounds).items()}
        slowed = slowed_by_company([sys.executable, "-m", "simulation.peft_loop", str(work)], rounds)
    width = max(map(len, table))
    print(f"{'':<{width}}  CPU s  wall s  PSS MB  start-up s", flush=True)
    for name, row in table.items():
        print(f"{name:<{width}}  {median(row.cpu_s):5.2f}  {median(row.wall_s):6.2f}  {row.pss_mb:6.0f}  {row.startup_s:10.1f}", flush=True)
    return table, Figure(f"{shape.name}: a PEFT loop beside another one, wall over alone", slowed)


def compare(shape: Shape, table: Mapping[str, Measured]) -> list[Figure]:
    """Print the ratios that have a bound; medians of the ratios round by round."""
    loop, opacus, wall = table["PEFT loop"].cpu_s, table["PEFT + Opacus loop"].cpu_s, table["ours, local"].wall_s

    def ratio(name: str, other: Sequence[float], seconds: str = "cpu_s") -> float:
        own: list[float] = getattr(table[name], seconds)
        return median(mine / theirs for mine, theirs in zip(own, other, strict=True))

    rows = [
        Figure(f"{shape.name}: local, CPU over a PEFT loop's", ratio("ours, local", loop), 1.05),
        Figure(f"{shape.name}: local, CPU over pfl's", ratio("ours, local", table["pfl 0.6.0"].cpu_s), 1.05),
        Figure(f"{shape.name}: stack of 8, CPU over a PEFT loop's", ratio("ours, stack of 8", loop), 0.75 if shape.batch == 4 else 1.0),
        Figure(f"{shape.name}: private, CPU over a PEFT + Opacus loop's", ratio("ours, private", opacus), 1.05),
        Figure(f"{shape.name}: private stack of 8, CPU over the same", ratio("ours, private, stack of 8", opacus)),
        Figure(f"{shape.name}: ray, 2 workers, wall over local's", ratio("ours, ray, 2 workers", wall, "wall_s"), 0.6),
        *against_flower(shape, table, ratio),
    ]
    return [show(row) for row in rows]


def against_flower(shape: Shape, table: Mapping[str, Measured], ratio: Callable[..., float]) -> list[Figure]:
    """Return ours over the Flower app that loads its model for each message: a round in the steady state, and the start apart."""
    app = "Flower app, plain loop"
    figures = []
    for name in ("ours, local", "ours, ray, 2 workers", "ours, flwr run"):
        cpu, wall = ratio(name, table[app].cpu_s), ratio(name, table[app].wall_s, "wall_s")
        figures += [
            Figure(f"{shape.name}: {name}, CPU of a round over the Flower app's", cpu),
            Figure(f"{shape.name}: {name}, wall of a round over the same", wall),
            Figure(f"{shape.name}: {name}, seconds to the first round over the same", table[name].startup_s / table[app].startup_s),
        ]
    return figures


if __name__ == "__main__":
    sys.exit(main())
