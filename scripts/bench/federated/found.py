"""What was measured of a federation, and the figures that it makes: differences and ratios of medians, each with its widest spread."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from statistics import median

from figures import Figure

from .field import Nodes
from .runs import Round

IDLE_S, ECHO_RATIO, SECOND_ROUND = 0.6, 1.5, 1.1
TIMES = (("wall", 0), ("CPU", 1))


@dataclass
class Found:
    """What was measured.

    Attributes:
        rounds: by kind of run.
        hashes: of the factors of runs without privacy.
        private: those of runs with it.
        loads: of models, of the node that loaded most, by run.
        missing: what could not be measured, with the reason.
        language: whether the model is a language model, whose compute is most of a round: the bound of the whole is for these.
    """

    rounds: dict[str, list[Round]] = field(default_factory=dict)
    hashes: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    loads: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    language: bool = False

    def add(self, kind: str, rounds: Sequence[Round]) -> None:
        """Take rounds in, and print them."""
        self.rounds.setdefault(kind, []).extend(rounds)
        for each in rounds:
            print(f"{kind:<24} {each.wall_s:7.2f} s wall  {each.cpu_s:7.3f} s CPU a node   load {os.getloadavg()[0]:.1f}", flush=True)

    @contextmanager
    def loading(self, run: str, online: Nodes) -> Iterator[None]:
        """Count the models that nodes load for the length of a block."""
        before = online.loaded()
        yield
        self.loads[run] = max(after - earlier for after, earlier in zip(online.loaded(), before, strict=True))

    def figures(self) -> Iterator[Figure]:
        """Yield the figures of what is there."""
        yield self._over("CPU s of an idle message above Flower's own ClientApp", _less, ("idle message", "empty echo"), 1, IDLE_S)
        for what, which in TIMES:
            for kind, echo, bound in (("with workers", "echo", ECHO_RATIO), ("without workers", "echo without workers", None)):
                if kind in self.rounds:
                    over = f"{what} of a round {kind}, less its compute, over an echo"
                    yield self._over(over, _share, (kind, "compute", echo), which, bound)
            whole = f"{what} of a round with workers over compute and echo"
            yield self._over(whole, _whole, ("with workers", "compute", "echo"), which, SECOND_ROUND if self.language else None)
            for kind, rounds in self.rounds.items():
                yield Figure(f"{what} s, {kind}", float(median(each[which] for each in rounds)))
        yield Figure("model loads a node, of the run with most", max(self.loads.values()), 1)
        yield Figure("different factors of runs without privacy, the local ones among them", len({*self.hashes}), 1)
        yield Figure("different factors of two runs with privacy", len({*self.private}), 2, at_least=True)

    def _over(self, what: str, over: Callable[..., float], kinds: Sequence[str], which: int, bound: float | None) -> Figure:
        return spread(what, over, [[each[which] for each in self.rounds[kind]] for kind in kinds], bound)


def spread(what: str, over: Callable[..., float], samples: Sequence[Sequence[float]], bound: float | None = None) -> Figure:
    """Return what medians make; its name tells the least and the most that any choice of one round a kind makes, of all of them."""
    found = [over(*chosen) for chosen in product(*samples)]
    return Figure(f"{what} ({min(found):.2f} to {max(found):.2f})", over(*map(median, samples)), bound)


def _less(own: float, other: float) -> float:
    return own - other


def _share(own: float, compute: float, echo: float) -> float:
    return (own - compute) / echo


def _whole(own: float, compute: float, echo: float) -> float:
    return own / (compute + echo)
