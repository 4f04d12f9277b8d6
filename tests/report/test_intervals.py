"""Intervals against SciPy's and against what theory says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fedsb.core.rng import numpy_generator
from fedsb.report.evaluation import Sample, rows_of
from fedsb.report.intervals import bootstrap, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 20), (20, 20), (1, 3), (11, 40), (500, 1000)])
def test_a_shares_interval_is_wilsons(right: int, count: int) -> None:
    known = binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right / count, count) == pytest.approx((known.low, known.high), abs=1e-7)


def test_a_means_interval_is_that_of_its_standard_error() -> None:
    values = numpy_generator(0, "test").normal(3.0, 2.0, 400)
    low, high = bootstrap(lambda chosen: {"mean": values[chosen].mean()}, len(values), numpy_generator(1, "test"))["mean"]
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.2 * error)


def test_differences_are_of_the_same_examples() -> None:
    """A model that is better by one on every example is better by one for sure, however unlike examples are."""
    values = numpy_generator(0, "test").normal(0.0, 50.0, 30)
    base, model = (Sample(30, lambda chosen, shift=shift: {"loss": float(values[chosen].mean()) + shift}) for shift in (1.0, 0.0))
    (row,) = rows_of([model], [base], seed=0)
    assert row.difference is not None
    assert row.difference.interval is not None
    assert row.difference.value == pytest.approx(-1)
    assert row.difference.interval == pytest.approx((-1, -1))
    assert row.model.interval is not None
    assert row.model.interval[1] - row.model.interval[0] > 10
    assert rows_of([model], [base], seed=0) == [row] != rows_of([model], [base], seed=1)
