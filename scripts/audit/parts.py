"""Examine a row: its parts by exact tests, its sensitivity by neighbouring data, the whole by attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from bounds import any_mechanism, gaussian
from exact import Bits, PValues, Values, draw_tests, largest_ratio, least, noise_tests, of_variance
from rows import DELTA, Row
from watch import Release

from fedsb.core.rng import numpy_generator
from fedsb.privacy.accounting import Entry, epsilon_of

# One run in so many only finds the threshold of the Gaussian bound.
PILOT = 4
# Canaries that are zeroed out alone, to measure what one moves a release by; rounding may add so much.
NEIGHBOURS, FEW, ROUNDING = 6, 2, 1e-4
# Below it an accountant's numbers end: no privacy to speak of.
LEAST_NOISE = 0.05
# Of the deviation charged: what is less counts as so much in the filters.
FLOOR = 1e-6


@dataclass
class Found:
    """What was found of a row.

    Attributes:
        claim: epsilon that the accountant gives for what was charged.
        bound: what epsilon exceeds whatever the mechanism is; None where no attack was made.
        gaussian: what it exceeds if the mechanism is Gaussian; None where that cannot be.
        parts: what the accountant gives for the noise and the sensitivity measured.
        sensitivity: most that a neighbour moves a release by, over C.
        p_values: of the exact tests.
        alpha: the row's.
    """

    claim: float
    alpha: float
    bound: float | None = None
    gaussian: float | None = None
    parts: float = 0.0
    sensitivity: float = 0.0
    count_sensitivity: float = 0.0
    p_values: PValues = field(default_factory=dict)

    @property
    def refuted(self) -> list[str]:
        """Name what shows that the claim is not kept; empty for code that keeps it."""
        level = self.alpha / 2 / max(1, len(self.p_values))
        names = [name for name, p in sorted(self.p_values.items(), key=lambda item: item[1]) if p < level]
        names += ["sensitivity"] if self.sensitivity > 1 + ROUNDING else []
        names += ["sensitivity of the count"] if self.count_sensitivity > 0.5 + ROUNDING else []
        names += ["an attack"] if (self.bound or 0.0) > self.claim else []
        names += ["an attack, if Gaussian"] if (self.gaussian or 0.0) > self.claim else []
        return names

    @property
    def least(self) -> float:
        """The least p-value, corrected for their number."""
        return least(list(self.p_values.values()))


def examine(row: Row, *, silent: int, runs: int, seed: int, alpha: float, brief: bool = False) -> Found:
    """Examine a row.

    Args:
        row: what is audited.
        silent: runs without any example present, to look at the noise.
        runs: runs with every canary in or out by a fair coin.
        seed: names the coins.
        alpha: probability with which code that keeps its claim is refuted: half of it for the exact tests, half for the attacks.
        brief: leave out what takes time and refutes nothing by itself.
    """
    nobody = np.zeros(row.examples, dtype=bool)
    empty = [row.release(nobody, run) for run in range(silent)]
    noise = [value / row.deviation for release in empty for value in release.values]
    bits = numpy_generator(seed, "bits", row.name).integers(0, 2, (runs, row.examples)).astype(bool)
    made = [row.release(bits[i], silent + i) for i in range(runs)]
    lags = range(1, len(empty[0].values) + 1)
    tests = {**noise_tests(noise, row.sizes, lags), **_draws(row, [*empty, *made], lags)}
    found = Found(epsilon_of([row.entry], DELTA), alpha, p_values=tests)
    count = _counts(row, bits, made)
    if count is not None:
        found.p_values["size of the count's noise"] = of_variance(count)
    found.sensitivity, found.count_sensitivity = sensitivity(row, FEW if brief else NEIGHBOURS)
    if not brief:
        found.parts = _epsilon(row, noise, count, found, alpha / 2 / len(found.p_values))
    if row.attacked and runs:
        totals = np.stack([np.sum(release.values, axis=0) for release in made])
        found.bound, found.gaussian = attack(row, noise, totals, bits, alpha=alpha / 2)
    return found


def _draws(row: Row, releases: Sequence[Release], lags: range) -> PValues:
    drawn = [release.drawn for release in releases if release.drawn is not None]
    return draw_tests(np.concatenate(drawn), row.entry.sampling_rate, lags) if drawn else {}


def _counts(row: Row, bits: Bits, made: Sequence[Release]) -> Values | None:
    if row.count_noise is None or not made:
        return None
    left = [r.counts - row.counted(present, r.drawn) for present, r in zip(bits, made, strict=True) if r.counts is not None]
    return np.concatenate(left) / row.count_noise


def sensitivity(row: Row, neighbours: int) -> tuple[float, float]:
    """Return the most that zeroing out one canary moves the first release, over C, and its count; noise and samples stay."""
    everyone = np.ones(row.examples, dtype=bool)
    whole = row.release(everyone, 0)
    drawn = np.flatnonzero(whole.drawn[0]) if whole.drawn is not None else np.arange(row.examples)
    moved, counted = 0.0, 0.0
    even = drawn[np.linspace(0, len(drawn) - 1, min(neighbours, len(drawn))).astype(int)]
    for i in even if row.neighbours is None else row.neighbours:
        other = row.release(everyone & (np.arange(row.examples) != i), 0)
        moved = max(moved, float(np.linalg.norm(whole.values[0] - other.values[0])))
        if whole.counts is not None and other.counts is not None:
            counted = max(counted, abs(float(whole.counts[0] - other.counts[0])))
    return moved, counted


def _epsilon(row: Row, noise: Sequence[Values], count: Values | None, found: Found, alpha: float) -> float:
    """Return epsilon of the least noised tensor, at the most noise that it may have, and of the sensitivity measured."""
    tensors = np.split(np.stack(noise), np.cumsum(list(row.sizes.values()))[:-1], axis=1)
    multiplier = row.deviation * min(largest_ratio(t, alpha) for t in tensors) / max(found.sensitivity, FLOOR)
    if count is not None and row.count_noise is not None:
        beside = row.count_noise * largest_ratio(count, alpha) / max(found.count_sensitivity, FLOOR)
        multiplier = (max(multiplier, FLOOR) ** -2 + max(beside, FLOOR) ** -2) ** -0.5
    if multiplier < LEAST_NOISE:
        return math.inf
    return epsilon_of([Entry("gaussian", row.entry.sampling_rate, multiplier, row.entry.steps)], DELTA)


def attack(row: Row, noise: Sequence[Values], totals: Values, bits: Bits, *, alpha: float) -> tuple[float, float | None]:
    """Return the best lower bounds on epsilon of some adversaries, who pay for being several (Bonferroni).

    One looks at all tensors as if their noise were alike; one divides each by the noise that it has in the runs without canaries; the
    others look at one tensor each (at that tensor of every client in a stack).
    """
    scores = _scores(row, np.stack(noise), totals)
    tight = row.entry.sampling_rate == 1.0 and row.entry.steps == 1
    each, pilot = alpha / len(scores) / (2 if tight else 1), len(totals) // PILOT
    bound = max(any_mechanism(s.ravel(), bits.ravel(), delta=DELTA, alpha=each) for s in scores)
    if not tight:
        return bound, None
    judged = bits[pilot:].ravel()
    return bound, max(gaussian(s[pilot:].ravel(), judged, float(s[:pilot].mean()), delta=DELTA, alpha=each) for s in scores)


def _scores(row: Row, noise: Values, totals: Values) -> list[Values]:
    """Return each adversary's scores, (runs, canaries)."""
    names = [name for name, size in row.sizes.items() for _ in range(size)]
    group = np.array([name.rpartition(": ")[2] for name in names])
    deviation = np.ones(len(names))
    for name in set(names):
        here = np.array(names) == name
        deviation[here] = max(FLOOR, math.sqrt(float(np.square(noise[:, here]).mean())))
    views = [np.ones(len(names), dtype=bool), *(group == g for g in sorted(set(group)))]
    return [matched(row.pulls, totals)] + [matched((row.pulls / deviation)[:, v], (totals / deviation)[:, v]) for v in views]


def matched(pulls: Values, totals: Values) -> Values:
    """Score totals by the orthonormal rows closest to the canaries' directions: noise of equal size, uncorrelated, on every score."""
    lengths = np.linalg.norm(pulls, axis=1, keepdims=True)
    left, _, right = np.linalg.svd(pulls / np.maximum(lengths, FLOOR), full_matrices=False)
    scores: Values = totals @ (left @ right).T
    return scores
