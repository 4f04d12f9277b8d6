"""The physical batches of a private step: which examples go through the model at once, and how many rows that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clients.clipping import FlatClipping

# With which probability a sample is larger than what a step of constant time has room for: it takes more batches then, and shows in time.
OVERFLOW = 1e-12


class Asked(list[dict[str, Any]]):
    """Examples whose gradients a private lesson needs next.

    Args:
        examples: those, fillers last.
        blank: how many of them only fill the batch: they are computed, and their losses count for nothing.
        probe: whether they are made up, to be computed without dropout and mixed precision.
    """

    def __init__(self, examples: Iterable[dict[str, Any]], *, blank: int = 0, probe: bool = False) -> None:
        super().__init__(examples)
        self.blank = blank
        self.probe = probe

    @property
    def counted(self) -> int:
        """How many of the examples count."""
        return len(self) - self.blank


def filled(examples: Sequence[dict[str, Any]], fill: dict[str, Any], rows: int) -> Asked:
    """Return examples filled up to a number of rows with one that does not count."""
    blank = max(0, rows - len(examples))
    return Asked([*examples, *[fill] * blank], blank=blank)


@dataclass(frozen=True)
class Room:
    """Physical batches of one size, as many a step whatever is drawn, so that its time does not tell how many examples were.

    Attributes:
        batches: a step has, at least.
        rows: each of them has.
    """

    batches: int
    rows: int

    @classmethod
    def of(cls, num_examples: int, sampling_rate: float, max_batch: int) -> Room:
        """Return the room that holds a Poisson sample but with probability :data:`OVERFLOW`: a function of public numbers alone."""
        # Opacus brings it in anyway; seconds to import.
        from scipy.stats import binom

        most = max(1, min(num_examples, int(binom.isf(OVERFLOW, num_examples, sampling_rate)))) if sampling_rate < 1 else num_examples
        batches = math.ceil(most / max_batch)
        return cls(batches, math.ceil(most / batches))

    def split(self, sample: Sequence[int]) -> list[Sequence[int]]:
        """Cut a sample into batches; some may be empty."""
        pieces = [sample[i : i + self.rows] for i in range(0, len(sample), self.rows)]
        return pieces + [[]] * (self.batches - len(pieces))


class RoomySampler:
    """Opacus' ``BatchSplittingSampler`` with the batches of a :class:`Room`.

    Args:
        sampler: gives the samples.
        room: to put each of them into.
        optimizer: is told which batches end a step.
    """

    def __init__(self, sampler: Iterable[Sequence[int]], room: Room, optimizer: FlatClipping) -> None:
        self._sampler, self._room, self._optimizer = sampler, room, optimizer

    def __iter__(self) -> Iterator[Sequence[int]]:
        for sample in self._sampler:
            *others, last = self._room.split(sample)
            for piece in others:
                self._optimizer.signal_skip_step(do_skip=True)
                yield piece
            self._optimizer.signal_skip_step(do_skip=False)
            yield last
