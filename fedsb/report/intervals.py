"""How sure a measured figure is: intervals at 95% over the examples that it was measured on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Z = 1.959964  # 95% of a normal distribution lie within as many standard deviations
DRAWS = 1000
Interval = tuple[float, float]
Metrics = Callable[[NDArray[np.int64]], Mapping[str, float]]


def deviation(values: Collection[float]) -> float:
    """Return the standard deviation of a sample: 0 of a single value, NaN where one is no finite number, which `statistics` refuses."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean: the sample's standard deviation over √n; None of a single value."""
    return deviation(values) / math.sqrt(len(values)) if len(values) > 1 else None


def wilson(share: float, count: int) -> Interval:
    """Return the interval of a proportion (Wilson 1927): one that holds where nothing, or everything, was right."""
    middle, square = share + Z**2 / (2 * count), Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def bootstrap(metrics: Metrics, count: int, generator: np.random.Generator) -> dict[str, Interval]:
    """Return the interval of each metric by the percentiles of its values on examples drawn again (Efron 1979).

    Args:
        metrics: of some examples, which may repeat, by their indices.
        count: of the examples.
        generator: where the draws come from.
    """
    found: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        for name, value in metrics(generator.integers(0, count, count)).items():
            found.setdefault(name, []).append(value)
    return {name: (float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))) for name, values in found.items()}
