"""Lower bounds on epsilon from guesses about which canaries were in the data. NumPy and SciPy, nothing of the project.

Two bounds. :func:`any_mechanism` holds for whatever (ε, δ)-private mechanism: canaries may share runs and depend on each other there.
:func:`gaussian` is much tighter, for it asks for more: trade-offs of Gaussian shape, and independent scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri
from scipy.stats import beta

Scores = NDArray[np.float64]
Bits = NDArray[np.bool_]
# Shares of the canaries that are guessed, the others being abstained from; a bound pays for trying each.
SHARES = (0.02, 0.1, 0.5)
# No bound is sought above it: no number of canaries that fits a run shows more.
LARGEST_EPSILON = 50.0


def any_mechanism(scores: Scores, bits: Bits, *, delta: float, alpha: float) -> float:
    """Return an epsilon that the mechanism, if (ε, δ)-private, exceeds with confidence 1 − alpha. 0 says nothing.

    The canaries with the highest scores are guessed to be in, as many with the lowest to be out; how many is fixed beforehand. Runs on
    disjoint sets of canaries count as one run: who flips one canary changes one of them (parallel composition).

    Args:
        scores: one a canary, higher where it rather was in; equal ones in an order that knows nothing of the bits.
        bits: whether it was in, by independent fair coins.
        delta: δ of the claim.
        alpha: probability of error.
    """
    order = np.argsort(scores, kind="stable")
    found = 0.0
    for share in SHARES:
        half = max(1, int(share * len(scores) / 2))
        correct = int(bits[order[-half:]].sum() + (~bits[order[:half]]).sum())
        found = max(found, from_guesses(len(scores), 2 * half, correct, delta=delta, alpha=alpha / len(SHARES)))
    return found


def from_guesses(canaries: int, guesses: int, correct: int, *, delta: float, alpha: float) -> float:
    """Return the largest epsilon that so many correct guesses refute; see :func:`any_mechanism`."""

    def refuted(epsilon: float) -> bool:
        return too_many(canaries, guesses, correct, least_wrong=approximate(epsilon, delta), alpha=alpha)

    low, high = 0.0, LARGEST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def approximate(epsilon: float, delta: float) -> Callable[[float], float]:
    """Return what probability an event keeps, at least, when one canary is flipped, from what it had: (ε, δ)-privacy both ways."""
    grown, shrunk = math.exp(epsilon), math.exp(-epsilon)
    return lambda p: max(0.0, (p - delta) * shrunk, 1.0 - delta - grown * (1.0 - p))


def too_many(canaries: int, guesses: int, correct: int, *, least_wrong: Callable[[float], float], alpha: float) -> bool:
    """Tell whether ``correct`` guesses or more have a probability below alpha (Mahloujifar et al. 2024, arXiv:2410.22235).

    It is one-run auditing (Steinke et al. 2023, arXiv:2305.08846) by another proof, which does not pay ``2 m δ`` for δ. Suppose that the
    probability is alpha. With p_i that of i correct guesses, ``right`` is ``Σ i p_i / m`` and ``wrong`` is ``Σ (guesses − i) p_i / m``
    over all i from some t on. Flipping a canary that was guessed right turns i correct guesses into i − 1, so ``right`` from t on
    bounds ``wrong`` from t − 1 on from below, and so on down to 0, where the two must make up ``guesses / m``.
    """
    right, wrong = alpha * correct / canaries, alpha * (guesses - correct) / canaries
    for i in range(correct - 1, -1, -1):
        more = least_wrong(right)
        if more <= wrong:
            break
        right, wrong = min(1.0, right + i / (guesses - i) * (more - wrong)), more
    return right + wrong > guesses / canaries


def gaussian(scores: Scores, bits: Bits, threshold: float, *, delta: float, alpha: float) -> float:
    """Return the epsilon of the least private Gaussian trade-off that the two error rates leave possible (Dong et al. 2019, 1905.02383).

    Both rates are bounded by Clopper and Pearson with alpha / 2 each.

    Args:
        scores: independent given the bits.
        bits: whether each canary was in.
        threshold: above it a canary is guessed to be in; found on other data.
        delta: δ of the claim.
        alpha: probability of error.
    """
    false_positive = rate_above(int((scores[~bits] > threshold).sum()), int((~bits).sum()), alpha / 2)
    false_negative = rate_above(int((scores[bits] <= threshold).sum()), int(bits.sum()), alpha / 2)
    return epsilon_of_shift(float(-ndtri(false_positive) - ndtri(false_negative)), delta)


def rate_above(count: int, trials: int, alpha: float) -> float:
    """Return the upper end of Clopper and Pearson's one-sided interval."""
    return 1.0 if count >= trials else float(beta.ppf(1 - alpha, count + 1, trials - count))


def epsilon_of_shift(shift: float, delta: float) -> float:
    """Return epsilon where one example moves unit Gaussian noise by ``shift`` (Balle and Wang 2018, arXiv:1805.06530), exactly.

    The project's accountants return upper bounds, which has a lower one no use for.
    """

    def excess(epsilon: float) -> float:
        mean, width = epsilon / shift, shift / 2
        kept, lost = float(log_ndtr(width - mean)), epsilon + float(log_ndtr(-width - mean))
        return kept + math.log1p(-math.exp(min(lost - kept, -1e-15))) - math.log(delta)

    if shift <= 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, shift * (shift / 2 - float(ndtri(delta))) + 1.0))
