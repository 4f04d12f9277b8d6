"""Who takes turns with whom, and which of their ratios have a bound.

A heat holds those that are compared with each other, and one at a time is at work. Where both cores are, what waits must be still: Flower's
processes look for work many times a second. All contestants at once would not fit into 24 GB at the large shape either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

from bench_figures import Figure

from simulation.contest import Contestant, Measured, Pair, Start, seconds_to_start, take_turns
from simulation.environments import environment
from simulation.workload import Shape, with_trainer

Heats = Mapping[str, Mapping[str, Measured]]
CPU, WALL = "cpu_s", "wall_s"
LOOP, PFL, TWO_LOOPS, OPACUS = "PEFT loop", "pfl 0.6.0", "two PEFT loops at once", "PEFT + Opacus loop"
APP, TRAINER = "Flower app, plain loop", "Flower app, HF Trainer"
LOCAL, STACK, RAY, FLWR = "ours, local", "ours, stack of 8", "ours, ray, 2 workers", "ours, flwr run"
PRIVATE, PRIVATE_STACK = "ours, private", "ours, private, stack of 8"
NAMES = ("plain", "cores", "flower", "private")
# Rounds that do not count; until each of Ray's workers has met each client, it still reads and tokenises texts for the first time.
WARM = {"cores": 4}


@dataclass(frozen=True)
class Ratio:
    """Two contestants of a heat held against each other; bounds by the batch of the shape."""

    what: str
    heat: str
    name: str
    over: str
    seconds: str = CPU
    bounds: Mapping[int, float] = field(default_factory=dict)

    def figure(self, shape: Shape, heats: Heats) -> Figure:
        """Return the median of the ratios round by round."""
        own, others = (getattr(heats[self.heat][name], self.seconds) for name in (self.name, self.over))
        value = median(mine / theirs for mine, theirs in zip(own, others, strict=True))
        return Figure(f"{shape.name}: {self.what}", value, self.bounds.get(shape.batch))


RATIOS = (
    Ratio("local, CPU over a PEFT loop's", "plain", LOCAL, LOOP, bounds={4: 1.05, 16: 1.05}),
    Ratio("local, CPU over pfl's", "plain", LOCAL, PFL, bounds={4: 1.05, 16: 1.05}),
    Ratio("stack of 8, CPU over a PEFT loop's", "plain", STACK, LOOP, bounds={4: 0.75, 16: 1.0}),
    Ratio("ray, 2 workers, wall over local's", "cores", RAY, LOCAL, WALL, bounds={4: 0.6, 16: 0.6}),
    Ratio("two PEFT loops at once, wall over one's", "cores", TWO_LOOPS, LOOP, WALL),
    Ratio("private, CPU over a PEFT + Opacus loop's", "private", PRIVATE, OPACUS, bounds={4: 1.05, 16: 1.05}),
    Ratio("private stack of 8, CPU over the same", "private", PRIVATE_STACK, OPACUS),
)


def heats_of(work: Path, private: Path, environments: Path) -> dict[str, dict[str, Start]]:
    """Return how each contestant starts, by heat."""
    flower, trainer = environment("flower", environments), with_trainer(work)
    ours, loop = [sys.executable, "-m", "simulation.ours"], [str(environment("peft", environments)), "-m", "simulation.peft_loop"]
    rounds = "-m", "simulation.flower_rounds"
    start = partial(partial, Contestant)
    local, alone = start([*ours, str(work)]), start([*loop, str(work)])
    ray = start([*ours, str(work), "runtime=ray", "runtime.workers=2", "runtime.cpus=0.5"])
    return {
        "plain": {
            LOOP: alone,
            PFL: start([str(environment("pfl", environments)), "-m", "simulation.pfl_loop", str(work)]),
            LOCAL: local,
            STACK: start([*ours, str(work), "runtime.stack=8"]),
        },
        "cores": {LOCAL: local, RAY: ray, LOOP: alone, TWO_LOOPS: partial(Pair, [*loop, str(work)])},
        "flower": {
            APP: start([str(flower), *rounds, "vanilla_flower", str(work)]),
            TRAINER: start([str(flower), *rounds, "vanilla_flower", str(trainer)]),
            LOCAL: local,
            RAY: ray,
            FLWR: start([sys.executable, *rounds, "ours_flower", str(work)]),
        },
        "private": {
            OPACUS: start([str(environment("opacus", environments)), "-m", "simulation.peft_loop", str(private), "--private"]),
            PRIVATE: start([*ours, str(private)]),
            PRIVATE_STACK: start([*ours, str(private), "runtime.stack=8"]),
        },
    }


def run_heats(heats: Mapping[str, Mapping[str, Start]], rounds: int) -> Heats:
    """Let each heat take its turns; those of Flower's start once more before, each by itself, for the seconds that this takes."""
    found: dict[str, dict[str, Measured]] = {}
    for heat, starts in heats.items():
        print(f"heat '{heat}': {', '.join(starts)} …", file=sys.stderr, flush=True)
        alone = {name: seconds_to_start(start) for name, start in starts.items()} if heat == "flower" else {}
        turns = take_turns(starts, rounds, WARM.get(heat, 1))
        found[heat] = {name: replace(row, startup_s=alone.get(name, row.startup_s)) for name, row in turns.items()}
    return found


def compared(shape: Shape, heats: Heats) -> Iterator[Figure]:
    """Yield the ratios: those with a bound, then ours over the Flower app, a round in the steady state and the start apart."""
    for ratio in RATIOS:
        if ratio.heat in heats:
            yield ratio.figure(shape, heats)
    for name in (LOCAL, RAY, FLWR) if "flower" in heats else ():
        yield Ratio(f"{name}, CPU of a round over the Flower app's", "flower", name, APP).figure(shape, heats)
        yield Ratio(f"{name}, wall of a round over the same", "flower", name, APP, WALL).figure(shape, heats)
        starts = [heats["flower"][each].startup_s for each in (name, APP)]
        yield Figure(f"{shape.name}: {name}, seconds to the first round over the same", starts[0] / starts[1])


def rows_of(heats: Heats) -> dict[str, Measured]:
    """Return one row a contestant, of the first heat that it was in; the yardstick of the cores is none."""
    rows: dict[str, Measured] = {}
    for heat in heats.values():
        rows = {**heat, **rows}
    return {name: rows[name] for heat in heats.values() for name in heat if name != TWO_LOOPS}
