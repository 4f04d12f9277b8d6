"""Heats of contestants that take turns, and which of their ratios have a bound."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar, cast

from figures import Figure

from contest.contest import Look, Rounds, Start, look_at, take_turns
from contest.contestants import APP, FLWR, LOCAL, LOOP, OPACUS, PFL, PRIVATE, PRIVATE_STACK, RAY, STACK, TWO_LOOPS, Heat
from contest.workload import Shape

Named = TypeVar("Named")
CPU, WALL = "cpu_s", "wall_s"
# Rounds that do not count; until each of Ray's workers has met each client, it still reads and tokenises texts for the first time.
WARM = {"cores": 4}


@dataclass(frozen=True)
class Contest:
    """What was found at one shape: each contestant by itself, and the rounds of each by heat."""

    alone: Mapping[str, Look]
    heats: Mapping[str, Mapping[str, Rounds]]

    def rows(self) -> Iterator[tuple[str, Rounds, Look]]:
        """Yield one row a contestant, with the rounds of the first heat that it was in; the yardstick of the cores is none."""
        for name, look in self.alone.items():
            yield name, next(heat[name] for heat in self.heats.values() if name in heat), look


@dataclass(frozen=True)
class Ratio:
    """Two contestants held against each other, in the heats named; bounds by the batch of the shape."""

    what: str
    heats: str
    name: str
    over: str
    seconds: str = CPU
    bounds: Mapping[int, float] = field(default_factory=dict)

    def figure(self, shape: Shape, found: Contest) -> Figure | None:
        """Return the median of the ratios round by round; None where none of the heats took place."""
        heats = [found.heats[heat] for heat in self.heats.split() if heat in found.heats]
        pairs = [pair for heat in heats for pair in zip(*(getattr(heat[n], self.seconds) for n in (self.name, self.over)), strict=True)]
        value = median(mine / theirs for mine, theirs in pairs) if pairs else None
        return None if value is None else Figure(f"{shape.name}: {self.what}", value, self.bounds.get(shape.batch))


RATIOS = (
    Ratio("local, CPU over a PEFT loop's", "plain cores", LOCAL, LOOP, bounds={4: 1.05, 16: 1.05}),
    Ratio("local, CPU over pfl's", "plain", LOCAL, PFL, bounds={4: 1.05, 16: 1.05}),
    Ratio("stack of 8, CPU over a PEFT loop's", "plain", STACK, LOOP, bounds={4: 0.75, 16: 1.0}),
    Ratio("ray, 2 workers, wall over local's", "cores", RAY, LOCAL, WALL, bounds={4: 0.6, 16: 0.6}),
    Ratio("two PEFT loops at once, wall over one's", "cores", TWO_LOOPS, LOOP, WALL),
    Ratio("private, CPU over a PEFT + Opacus loop's", "private", PRIVATE, OPACUS, bounds={4: 1.05, 16: 1.05}),
    Ratio("private stack of 8, CPU over the same", "private", PRIVATE_STACK, OPACUS),
    *(
        ratio
        for name in (LOCAL, RAY, FLWR)
        for ratio in (
            Ratio(f"{name}, CPU of a round over the Flower app's", "flower", name, APP),
            Ratio(f"{name}, wall of a round over the same", "flower", name, APP, WALL),
        )
    ),
)


def run_heats(heats: Mapping[str, Heat], rounds: int) -> Contest:
    """Look at each contestant by itself, then let each heat take its turns."""
    by_name = {name: cast(Start, start) for heat in heats.values() for name, start in heat.items() if name != TWO_LOOPS}
    alone = {name: look_at(start) for name, start in _told("by itself", by_name)}
    found = {heat: take_turns(starts, rounds, WARM.get(heat, 1)) for heat, starts in _told("heat", heats)}
    return Contest(alone, found)


def _told(what: str, named: Mapping[str, Named]) -> Iterator[tuple[str, Named]]:
    for name, each in named.items():
        print(f"{what}: {name} …", file=sys.stderr, flush=True)
        yield name, each


def compared(shape: Shape, found: Contest) -> Iterator[Figure]:
    """Yield the ratios of rounds in the steady state, then how long ours take to start over the Flower app."""
    yield from filter(None, (ratio.figure(shape, found) for ratio in RATIOS))
    for name in (LOCAL, RAY, FLWR) if "flower" in found.heats else ():
        starts = [found.alone[each].startup_s for each in (name, APP)]
        yield Figure(f"{shape.name}: {name}, seconds to the first round over the Flower app's", starts[0] / starts[1])
