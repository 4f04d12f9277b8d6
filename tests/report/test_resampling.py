"""The two-level bootstrap against closed forms, a slow loop, and what must come out exactly."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from fedsb.report.resampling import Difference, Gain, two_level


def gains(values: np.ndarray, weights: np.ndarray | None = None, first: int = 0) -> list[Gain]:
    """Return a pair of methods: a row a seed."""
    rows = np.ones_like(values) if weights is None else weights
    return [Gain(first + seed, f"test {first + seed}", row, w) for seed, (row, w) in enumerate(zip(values, rows, strict=True))]


def alone(pair: list[Gain], draws: int = 2000) -> Difference:
    (found,) = two_level([pair], draws)
    return found


@pytest.mark.parametrize(("seeds", "items", "between"), [(1, 400, 0.0), (3, 200, 0.0), (12, 60, 0.3), (12, 60, 0.0)])
def test_of_many_items_it_has_the_variance_and_the_normal_interval_of_theory(seeds: int, items: int, between: float) -> None:
    draw = np.random.default_rng(7)
    values = draw.normal(0.1, 1.0, (seeds, items)) + draw.normal(0.0, between, (seeds, 1))
    means, within = values.mean(1), values.var(1) / items
    error = math.sqrt((means.var() + within.mean()) / seeds)
    found = alone(gains(values), 4000)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(error, rel=0.05)
    assert found.interval == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    assert found.seeds == seeds


def test_weighted_means_have_the_variance_of_a_ratio() -> None:
    draw = np.random.default_rng(3)
    values, weights = draw.normal(0.5, 1.0, (1, 500)), draw.integers(1, 40, (1, 500)).astype(float)
    mean = np.average(values[0], weights=weights[0])
    error = math.sqrt(np.mean((weights[0] * (values[0] - mean)) ** 2) / 500) / weights.mean()
    found = alone(gains(values, weights), 4000)
    assert found.value == pytest.approx(mean)
    assert found.error == pytest.approx(error, rel=0.05)


def test_it_is_the_loop_over_seeds_and_items() -> None:
    """Few items and seeds, where no normal distribution helps: the same draws, one after the other, by Python's own generator."""
    rows = [[0.0, 0.0, 1.0, -1.0], [1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    draw, found = random.Random(5), []
    for _ in range(20000):
        chosen = [rows[draw.randrange(3)] for _ in rows]
        found.append(statistics.fmean(statistics.fmean(row[draw.randrange(4)] for _ in row) for row in chosen))
    fast = alone(gains(np.array(rows)), 20000)
    assert fast.error == pytest.approx(statistics.pstdev(found), rel=0.03)
    assert fast.interval == pytest.approx(tuple(np.percentile(found, (2.5, 97.5))), abs=0.09)


def test_equal_runs_differ_by_nothing_at_all() -> None:
    found = alone(gains(np.zeros((3, 50))))
    assert (found.value, found.interval, found.error) == (0.0, (0.0, 0.0), 0.0)
    assert not found.is_clear


def test_one_seed_stands_out_for_nothing_and_several_do() -> None:
    one, three = alone(gains(np.ones((1, 20)))), alone(gains(np.ones((3, 20))))
    assert one.interval == three.interval == (1.0, 1.0)
    assert (one.is_clear, one.stands_out, three.stands_out) == (True, False, True)


def test_draws_are_the_same_in_every_call_and_whoever_is_compared_beside() -> None:
    draw = np.random.default_rng(1)
    few, many, others = (gains(draw.normal(0, 1, (seeds, 60)), first=first) for seeds, first in ((2, 0), (5, 0), (3, 9)))
    together = two_level([few, many, others])
    assert together == two_level([few, many, others])
    for pair, found in zip((few, many, others), together, strict=True):
        by_itself = alone(pair)
        assert (by_itself.interval, by_itself.error) == (pytest.approx(found.interval), pytest.approx(found.error))
    assert two_level([]) == []


def test_items_that_seeds_share_are_drawn_once_for_all() -> None:
    """Of seeds that agree item by item five tell no more than one; and in general it is the loop that draws seeds and items alike."""
    draw = np.random.default_rng(4)
    row = draw.normal(0.0, 1.0, 200)
    same = [Gain(seed, "test", row, np.ones(200)) for seed in range(5)]
    assert alone(same, 4000).error == pytest.approx(row.std() / math.sqrt(200), rel=0.05)
    values = draw.normal(0.0, 1.0, 30) + draw.normal(0.0, 0.5, (4, 30)) + draw.normal(0.0, 0.3, (4, 1))
    found = [values[np.ix_(draw.integers(0, 4, 4), draw.integers(0, 30, 30))].mean() for _ in range(20000)]
    fast = alone([Gain(seed, "test", each, np.ones(30)) for seed, each in enumerate(values)], 20000)
    assert fast.error == pytest.approx(statistics.pstdev(found), rel=0.03)
    assert fast.interval == pytest.approx(tuple(np.percentile(found, (2.5, 97.5))), abs=0.03)
    assert fast.value == pytest.approx(values.mean())
