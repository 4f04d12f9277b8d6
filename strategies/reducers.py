"""How uploads become the next state: tensors in, tensors out; no Flower, no logging, no random state.

A reducer is used as ``begin(current)``, ``add(upload, weight)`` in dispatch order, ``finish() -> Aggregate``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fedsb.core.state import State, WeightedSum


@dataclass(frozen=True)
class Aggregate:
    """What a round leads to.

    Attributes:
        state: the next trained state, float32, as clients will decode it.
        residual: what is added to the frozen weights, roles ``U`` (m, ρ) and ``V`` (ρ, n); empty for most methods.
        extras: figures of the method for the round's record.
    """

    state: State
    residual: State = field(default_factory=State)
    extras: dict[str, float] = field(default_factory=dict)


class Reducer(Protocol):
    """The rule of a method."""

    def begin(self, current: State) -> None:
        """Forget earlier rounds; ``current`` is what the clients were sent."""

    def add(self, upload: State, weight: float) -> None:
        """Take one upload with its weight (not normalised)."""

    def finish(self) -> Aggregate:
        """Return the result of the round."""


class MeanReducer:
    """The weighted mean of every tensor: FedAvg's rule (McMahan et al. 2017, arXiv:1602.05629), on whatever factors are trained.

    Memory is that of one upload, whatever the number of clients; the sum is kept in float64.

    Args:
        decode: rounds a state to what clients decode from the wire.
    """

    def __init__(self, decode: Callable[[State], State]) -> None:
        self._decode = decode
        self._sum = WeightedSum()

    def begin(self, current: State) -> None:
        """Start an empty sum."""
        self._sum = WeightedSum()

    def add(self, upload: State, weight: float) -> None:
        """Add ``weight · upload``."""
        self._sum.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean."""
        return Aggregate(self._decode(self._sum.mean()))
