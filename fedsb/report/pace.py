"""How fast a run goes, how long it still takes, and how much memory it holds."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import psutil

MEMORY_EVERY_S = 2.0  # a look at the processes costs milliseconds


class Pace:
    """Counts replies and rounds.

    Args:
        num_rounds: how many rounds the run has.
        examples: that a client trains on in a round, on average, repeated ones included; None where nobody knows.
        clock: gives seconds.
    """

    def __init__(self, num_rounds: int, examples: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_rounds = num_rounds
        self._examples = examples
        self._clock = clock
        self._round = self._asked = self._answered = 0
        self._begun = clock()
        self._took: list[float] = []
        self._looked, self._memory = float("-inf"), 0

    def begin(self, round_number: int, asked: int) -> None:
        """Start a round, or another exchange of it, that asks so many clients."""
        self._round, self._asked, self._answered, self._begun = round_number, asked, 0, self._clock()

    def reply(self) -> None:
        """Count a reply."""
        self._answered += 1

    def end(self, wall_s: float) -> None:
        """Finish a round that took so long, its evaluation included."""
        if self._round:
            self._took.append(wall_s)

    def examples_per_s(self) -> float | None:
        """Return the examples that the round's clients have trained on in a second."""
        elapsed = self._clock() - self._begun
        if self._examples is None or not self._round or not self._answered or elapsed <= 0:
            return None
        return self._answered * self._examples / elapsed

    def eta_s(self) -> float | None:
        """Return the seconds that the run still takes, by its rounds so far, or by the replies of its first; None before the first."""
        elapsed = self._clock() - self._begun
        left = self._num_rounds - self._round
        if self._took:
            mean = sum(self._took) / len(self._took)
            return max(0.0, mean - elapsed) * (self._answered < self._asked) + mean * left
        if not self._round or not self._answered:
            return None
        whole = elapsed * self._asked / self._answered
        return whole - elapsed + whole * left

    def memory_bytes(self) -> int:
        """Return the memory of this process and all below it, shared pages counted once a process; looked up every few seconds."""
        if self._clock() - self._looked >= MEMORY_EVERY_S:
            self._looked, self._memory = self._clock(), resident_bytes()
        return self._memory


def resident_bytes() -> int:
    """Return the resident memory of this process and all below it."""
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total
