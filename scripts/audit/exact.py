"""Tests of a mechanism's parts by their exact distributions: the noise, and which examples are drawn; nothing of the project is used.

Each test gives a p-value by name; all are two-sided, for a claim can be missed both ways. A fault of a part shows here with far fewer
releases than an attack on the whole needs, and where an attack sees next to nothing: behind sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, chi2, kstest, norm

Values = NDArray[np.float64]
Bits = NDArray[np.bool_]
PValues = dict[str, float]
Scalar = TypeVar("Scalar", bound=np.generic)
# Examples drawn together: how far apart in the data they are looked for.
GAPS = (1, 2, 3)
# Values that the shape of the noise is seen by: Kolmogorov and Smirnov's exact distribution takes long for more.
SHAPED = 1000


def noise_tests(noise: Sequence[Values], sizes: Mapping[str, int], lags: Iterable[int]) -> PValues:
    """Hold noise against independent standard normal values.

    Args:
        noise: releases in the order of their making, each divided by the deviation that was charged; all of one layout.
        sizes: of the tensors, which lie one after the other.
        lags: how many releases apart two are looked for that depend on each other.
    """
    whole = np.stack(noise)
    tensors = dict(zip(sizes, np.split(whole, np.cumsum(list(sizes.values()))[:-1], axis=1), strict=True))
    found = {f"size of the noise, {name}": of_variance(t) for name, t in tensors.items()}
    found["size of the noise, one release"] = least([of_variance(row) for row in whole])
    found["shape of the noise"] = float(kstest(whole.ravel()[:SHAPED], "norm").pvalue)
    for lag in lags:
        first, second = apart(whole, lag)
        if len(first):
            found[f"noise {lag} releases apart"] = of_product(first, second)
    for (one, a), (other, b) in combinations(tensors.items(), 2):
        width = min(a.shape[1], b.shape[1])
        found[f"noise of {one} and {other}"] = of_product(a[:, :width], b[:, :width])
    for name, t in tensors.items():
        half = t.shape[1] // 2
        if half:
            ends, turns = of_product(t[:, :half], t[:, -half:]), of_product(t[:, : 2 * half : 2], t[:, 1::2][:, :half])
            found[f"noise within {name}"] = least([ends, turns])
    return found


def of_variance(values: Values) -> float:
    """Return the p-value of a sum of squares as that of chi-square."""
    total = float(np.square(values).sum())
    return both(float(chi2.cdf(total, values.size)), float(chi2.sf(total, values.size)))


def largest_ratio(values: Values, alpha: float) -> float:
    """Return the deviation, over that charged, that noise has at most, with confidence 1 − alpha."""
    return math.sqrt(float(np.square(values).sum()) / float(chi2.ppf(alpha, values.size)))


def of_product(a: Values, b: Values) -> float:
    """Return the p-value of ``Σ a b / ‖b‖``: standard normal whatever b is, where a is standard normal and independent of b."""
    length = float(np.linalg.norm(b))
    return both(*(float(tail(float((a * b).sum()) / length)) for tail in (norm.cdf, norm.sf))) if length else 0.0


def draw_tests(drawn: Bits, rate: float, lags: Iterable[int]) -> PValues:
    """Hold samples against independent coins: one for each step and example.

    Args:
        drawn: (steps, examples), steps in the order of their making.
        rate: q.
        lags: how many steps apart two are looked for that depend on each other.
    """
    steps, examples = drawn.shape
    found = {
        "number drawn": of_count(int(drawn.sum()), drawn.size, rate),
        "number drawn, one step": least(of_counts(drawn.sum(1), examples, rate)),
        "spread of the number drawn": of_spread(drawn.sum(1), examples, rate),
        "how often one is drawn": least(of_counts(drawn.sum(0), steps, rate)),
        "spread of how often one is drawn": of_spread(drawn.sum(0), steps, rate),
    }
    for lag in lags:
        found[f"drawn again {lag} steps later"] = of_pairs(*apart(drawn, lag), rate)
    for gap in GAPS:
        found[f"drawn with the one {gap} further on"] = of_pairs(*apart(drawn.T, gap), rate)
    return {name: p for name, p in found.items() if not math.isnan(p)}


def of_count(count: int, trials: int, rate: float) -> float:
    """Return the p-value of a binomial count."""
    return float(of_counts(np.array(count), trials, rate))


def of_counts(counts: NDArray[np.int64], trials: int, rate: float) -> Values:
    """Return the p-values of binomial counts: twice the smaller tail, the count itself included."""
    tails = np.minimum(binom.cdf(counts, trials, rate), binom.sf(counts - 1, trials, rate))
    found: Values = np.minimum(1.0, 2 * tails)
    return found


def of_spread(counts: Values, trials: int, rate: float) -> float:
    """Return the p-value of how many of the binomial counts lie within half a deviation of their mean: a binomial count itself."""
    width = 0.5 * math.sqrt(trials * rate * (1 - rate))
    inside = [k for k in range(trials + 1) if abs(k - trials * rate) <= width]
    within = int(np.isin(counts, inside).sum())
    return of_count(within, len(counts), min(1.0, float(binom.pmf(inside, trials, rate).sum())))


def of_pairs(first: Bits, second: Bits, rate: float) -> float:
    """Return the p-value of how often both of a pair are drawn; NaN without pairs."""
    return of_count(int((first & second).sum()), first.size, rate**2) if first.size else math.nan


def apart(rows: NDArray[Scalar], lag: int) -> tuple[NDArray[Scalar], NDArray[Scalar]]:
    """Return pairs of rows ``lag`` apart, each row in one pair at most, so that the pairs are independent of each other."""
    blocks = len(rows) // (2 * lag)
    cut = rows[: blocks * 2 * lag].reshape(blocks, 2, lag, *rows.shape[1:])
    return cut[:, 0].reshape(-1, *rows.shape[1:]), cut[:, 1].reshape(-1, *rows.shape[1:])


def least(p_values: Sequence[float] | Values) -> float:
    """Return the least of several p-values, corrected for their number (Bonferroni)."""
    return min(1.0, len(p_values) * float(np.min(p_values)))


def both(lower: float, upper: float) -> float:
    """Return a two-sided p-value from the two tails."""
    return min(1.0, 2 * min(lower, upper))
