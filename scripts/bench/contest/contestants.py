"""Who takes part, who takes turns with whom, and how each starts.

A heat holds those that are compared with each other, and one at a time is at work. Where both cores are, what waits must be still: Flower's
processes look for work many times a second. All contestants at once would not fit into 24 GB at the large shape either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from contest.contest import Contestant, Pair, Start
from contest.environments import environment
from contest.workload import with_trainer

Heat = Mapping[str, Callable[[], Contestant | Pair]]
LOOP, PFL, TWO_LOOPS, OPACUS = "PEFT loop", "pfl 0.6.0", "two PEFT loops at once", "PEFT + Opacus loop"
APP, TRAINER = "Flower app, plain loop", "Flower app, HF Trainer"
LOCAL, STACK, RAY, FLWR = "ours, local", "ours, stack of 8", "ours, ray, 2 workers", "ours, flwr run"
PRIVATE, PRIVATE_STACK = "ours, private", "ours, private, stack of 8"
ROUNDS = ("-m", "contest.flower_rounds")


@dataclass(frozen=True)
class Starts:
    """How the contestants of each heat start; the environments are made that a heat needs.

    Attributes:
        work, private: workloads without and with privacy.
        environments: folder of the opponents' environments.
    """

    work: Path
    private: Path
    environments: Path

    def plain(self) -> Heat:
        """Return those of which each does a round on one core."""
        return {
            LOOP: self._start(*self._loop()),
            PFL: self._start(self._python("pfl"), "-m", "contest.pfl_loop", str(self.work)),
            LOCAL: self._ours(),
            STACK: self._ours("runtime.stack=8"),
        }

    def cores(self) -> Heat:
        """Return those that need both cores, with those that they are held against."""
        return {LOCAL: self._ours(), RAY: self._ray(), LOOP: self._start(*self._loop()), TWO_LOOPS: partial(Pair, self._loop())}

    def flower(self) -> Heat:
        """Return Flower's, and ours beside them."""
        app = self._python("flower"), *ROUNDS, "vanilla_flower"
        return {
            APP: self._start(*app, str(self.work)),
            TRAINER: self._start(*app, str(with_trainer(self.work))),
            LOCAL: self._ours(),
            RAY: self._ray(),
            FLWR: self._start(sys.executable, *ROUNDS, "ours_flower", str(self.work)),
        }

    def under_privacy(self) -> Heat:
        """Return those that train with DP-SGD."""
        return {
            OPACUS: self._start(self._python("opacus"), "-m", "contest.peft_loop", str(self.private), "--private"),
            PRIVATE: self._ours(work=self.private),
            PRIVATE_STACK: self._ours("runtime.stack=8", work=self.private),
        }

    def _ours(self, *overrides: str, work: Path | None = None) -> Start:
        return self._start(sys.executable, "-m", "contest.ours", str(work or self.work), *overrides)

    def _ray(self) -> Start:
        return self._ours("runtime=ray", "runtime.workers=2", "runtime.cpus=0.5")

    def _loop(self) -> Sequence[str]:
        return self._python("peft"), "-m", "contest.peft_loop", str(self.work)

    def _python(self, name: str) -> str:
        return str(environment(name, self.environments))

    @staticmethod
    def _start(*command: str) -> Start:
        return partial(Contestant, command)


HEATS: dict[str, Callable[[Starts], Heat]] = {
    "plain": Starts.plain,
    "cores": Starts.cores,
    "flower": Starts.flower,
    "private": Starts.under_privacy,
}
