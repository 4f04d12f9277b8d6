"""How uploads become what clients hold next: tensors in, tensors out; no Flower, no logging, no random state.

A rule is either a function of the uploads' mean, plain or private, or a :class:`Reducer` over the uploads themselves. The mean is a
:class:`Mean` whoever makes it: ``begin(current)``, ``add(upload, weight)`` in dispatch order, ``finish()``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fedsb.core.state import State, WeightedSum


@dataclass(frozen=True)
class Aggregate:
    """What a round leads to.

    Attributes:
        state: the next values of factors and head, by name; the shell rounds them, and puts into the log what clients hold from there.
        log: what is added to the log beside: ``U`` (m, ρ) and ``V`` (ρ, n) add to the frozen weights, a factor takes the place of its last
            version.
        extras: figures of the method for the round's record.
    """

    state: State
    log: State = field(default_factory=State)
    extras: dict[str, float] = field(default_factory=dict)


class Reducer(Protocol):
    """A rule over all uploads of a round."""

    def begin(self, current: State) -> None:
        """Forget earlier rounds; ``current`` is what the clients were sent, of what they upload."""

    def add(self, upload: State, weight: float) -> None:
        """Take one upload with its weight (not normalised)."""

    def finish(self) -> Aggregate:
        """Return the result of the round."""


class Mean(Protocol):
    """What makes the mean of a round's uploads."""

    def begin(self, current: State) -> None:
        """Forget earlier rounds; ``current`` is what the clients were sent, of what they upload."""

    def add(self, upload: State, weight: float) -> None:
        """Take one upload with its weight (not normalised)."""

    def finish(self) -> Aggregate:
        """Return the mean in float64, and figures of how it was made."""


class PlainMean:
    """The weighted mean of every tensor: FedAvg's rule (McMahan et al. 2017, arXiv:1602.05629), on whatever is uploaded.

    Memory is that of one upload, whatever the number of clients; the sum is kept in float64.
    """

    def __init__(self) -> None:
        self._sum = WeightedSum()

    def begin(self, current: State) -> None:
        """Start an empty sum."""
        self._sum = WeightedSum()

    def add(self, upload: State, weight: float) -> None:
        """Add ``weight · upload``."""
        self._sum.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean, in float64."""
        return Aggregate(self._sum.mean())
