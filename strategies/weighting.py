"""Weights of the uploads in a round's mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Weighting(Protocol):
    """Gives the weight of an upload in a round's mean, where the weights are divided by their sum, and how much of it is taken."""

    def weight(self, client: str, num_examples: int) -> float:
        """Return the weight of a client's upload in the round under way."""

    def share(self, total: float) -> float:
        """Return the factor on the mean update, from the sum of the round's weights."""

    def end_round(self, took_part: Collection[str]) -> None:
        """Learn whose uploads counted in a round."""

    def carried(self) -> dict[str, list[float]]:
        """Return what is carried on from round to round, by client."""

    def take_up(self, carried: Mapping[str, Sequence[float]]) -> None:
        """Go on from what was :meth:`carried`."""


@dataclass(frozen=True)
class Fixed:
    """A weight that follows from the number of examples alone."""

    rule: Callable[[int], float]

    def weight(self, client: str, num_examples: int) -> float:
        """Return the weight."""
        return self.rule(num_examples)

    def share(self, total: float) -> float:
        """Return 1: the mean is taken as it is."""
        return 1.0

    def end_round(self, took_part: Collection[str]) -> None:
        """Do nothing."""

    def carried(self) -> dict[str, list[float]]:
        """Return nothing."""
        return {}

    def take_up(self, carried: Mapping[str, Sequence[float]]) -> None:
        """Do nothing."""


@dataclass
class Interval:
    """How long a client stays away: the mean of ``count`` finished intervals, and rounds since the last one ended."""

    mean: float = 1.0
    count: int = 0
    since: int = 0

    def finish(self) -> None:
        """End an interval here and add it to the mean."""
        self.mean = (self.count * self.mean + self.since) / (self.count + 1)
        self.count += 1
        self.since = 0


class FedAU:
    """Weights against unknown participation: a client that takes part with probability p counts 1/p times, p learnt as the run goes.

    The weight of client n is the mean length of its finished intervals between two rounds in which its upload counted; an interval is
    finished after ``cutoff`` rounds in any case, which bounds the weights. The weighted sum of the updates is divided by the number of
    *all* clients, so that every client counts alike in the objective, however often it comes and whatever its number of examples (Wang
    and Ji 2023, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", arXiv:2306.03401,
    algorithm 2).

    Args:
        clients: of the federation.
        cutoff: K, in rounds.
    """

    def __init__(self, clients: Sequence[str], cutoff: int) -> None:
        self._intervals = {client: Interval() for client in clients}
        self._cutoff = cutoff

    def weight(self, client: str, num_examples: int) -> float:
        """Return ω of the client, from the rounds that are over."""
        return self._intervals[client].mean

    def share(self, total: float) -> float:
        """Return Σ ω / N: the mean over the round's clients becomes a sum over them, divided by the number of all."""
        return total / len(self._intervals)

    def end_round(self, took_part: Collection[str]) -> None:
        """Let a round pass for every client of the federation."""
        here = set(took_part)
        for client, interval in self._intervals.items():
            interval.since += 1
            if client in here or interval.since == self._cutoff:
                interval.finish()

    def carried(self) -> dict[str, list[float]]:
        """Return the intervals."""
        return {client: [interval.mean, interval.count, interval.since] for client, interval in self._intervals.items()}

    def take_up(self, carried: Mapping[str, Sequence[float]]) -> None:
        """Go on from these intervals."""
        self._intervals = {client: Interval(mean, int(count), int(since)) for client, (mean, count, since) in carried.items()}


Make = Callable[[Sequence[str], int], Weighting]
WEIGHTINGS: dict[str, Make] = {
    "examples": lambda clients, cutoff: Fixed(float),
    "uniform": lambda clients, cutoff: Fixed(lambda num_examples: 1.0),
    "fedau": FedAU,
}
