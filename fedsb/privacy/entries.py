"""One kind of release, as plans foresee it and ledgers keep it, and the bounds within which every accountant has an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedsb.privacy.sampling import drawn_rate

MECHANISMS = ("gaussian",)
# Beyond these a noise protects nothing, or leaves nothing, and accountants leave float64.
SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER = 1e-6, 1e6
MOST_STEPS = 10**9


@dataclass(frozen=True)
class Entry:
    """Releases of one kind: ``steps`` sums over a Poisson sample of the examples, each clipped, with Gaussian noise on the sum.

    Attributes:
        mechanism: ``gaussian``, the Poisson-subsampled Gaussian mechanism.
        sampling_rate: probability in (0, 1] with which each example enters a sum, rounded up to what is really drawn; 1: nothing is
            sampled.
        noise_multiplier: standard deviation of the noise over the clipping bound, in [1e-6, 1e6]; or 0, which protects nothing.
        steps: number of sums released, each with a sample and noise of its own, at most 10^9.

    Raises:
        ValueError: a value is outside its range.
    """

    mechanism: str
    sampling_rate: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"mechanism is '{self.mechanism}'; it must be one of {', '.join(MECHANISMS)}")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling rate is {self.sampling_rate}; it must lie in (0, 1]")
        if self.noise_multiplier and not SMALLEST_MULTIPLIER <= self.noise_multiplier <= LARGEST_MULTIPLIER:
            raise ValueError(f"noise multiplier is {self.noise_multiplier}; it must be 0 or lie in [1e-6, 1e6]")
        if not (isinstance(self.steps, int) and 0 <= self.steps <= MOST_STEPS):
            raise ValueError(f"steps are {self.steps}; they must be a whole number from 0 to 10^9")
        object.__setattr__(self, "sampling_rate", drawn_rate(self.sampling_rate))


UNNOISED = Entry("gaussian", 1.0, 0.0, 1)


def read_entry(fields: Mapping[str, Any]) -> Entry:
    """Return an entry as a ledger holds it.

    One that an earlier version let in, outside today's bounds, comes back as :data:`UNNOISED`: no noise that can be vouched for.

    Raises:
        ValueError: no version writes such an entry.
        TypeError: fields are missing, of another kind, or unknown.
    """
    entry = _Written(**fields)
    try:
        return Entry(entry.mechanism, entry.sampling_rate, entry.noise_multiplier, entry.steps)
    except ValueError:
        if entry.mechanism in MECHANISMS and entry.is_old():
            return UNNOISED
        raise


@dataclass(frozen=True)
class _Written:
    mechanism: str
    sampling_rate: float
    noise_multiplier: float
    steps: int

    def is_old(self) -> bool:
        """Tell whether it lies within the bounds of earlier versions, which were none."""
        return 0 < self.sampling_rate <= 1 and 0 <= self.noise_multiplier < math.inf and isinstance(self.steps, int) and self.steps >= 0
