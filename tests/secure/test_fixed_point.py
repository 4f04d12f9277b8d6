"""Fixed point: no wrap-around whatever is summed, the stated rounding, and no value cut in silence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsb.secure.fixed_point import FixedPoint, coded_bytes
from fedsb.secure.masks import mask
from tests.secure.exchanges import plain_sum

BOUNDS = st.sampled_from([1e-6, 0.37, 1.0, 12.5, 1e12])


@st.composite
def sums(draw: st.DrawFn) -> tuple[FixedPoint, list[float], list[np.ndarray]]:
    bound, clients = draw(BOUNDS), draw(st.integers(1, 40))
    raw = draw(st.lists(st.integers(0, 1000), min_size=clients, max_size=clients).filter(any))
    weights = [each / sum(raw) for each in raw]
    factor = draw(arrays(np.float64, (clients, 5), elements=st.floats(-2, 2)))
    return FixedPoint(bound, clients), weights, [*(factor * bound).astype(np.float32)]


@given(sums())
def test_a_sum_is_the_weighted_mean_of_what_was_cut_to_the_bound(case: tuple[FixedPoint, list[float], list[np.ndarray]]) -> None:
    point, weights, values = case
    wide = [each.astype(np.float64) for each in values]
    wanted = sum(w * np.clip(each, -point.bound, point.bound) for w, each in zip(weights, wide, strict=True)) / sum(weights)
    found, cut = point.decode(plain_sum([point.encode(each, w) for each, w in zip(values, weights, strict=True)]), sum(weights))
    assert (np.abs(found - wanted) <= point.worst(len(values), sum(weights)) + 1e-12 * point.bound).all()
    assert cut == sum(int((np.abs(each) > point.bound).sum()) for each in wide)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clients", [1, 3, 25, 1000, 10**6])
def test_the_largest_sum_there_can_be_does_not_wrap(clients: int, sign: int) -> None:
    """All values at the bound, with weights whose products are rounded away from zero where they can."""
    point = FixedPoint(0.7, clients)
    one = int(point.encode(np.full(1, sign * 9.0), 1 / clients)[0].astype(np.int32))
    assert abs(one) * clients <= 2**31 - 1
    assert abs(one) * clients > 0.99 * 2**31 - 2 * clients


def test_the_rounding_is_as_large_as_stated() -> None:
    draw, clients = np.random.default_rng(0), 25
    values, weights = draw.uniform(-1, 1, (clients, 20000)), np.full(clients, 1 / clients)
    point = FixedPoint(1.0, clients)
    found, _ = point.decode(plain_sum([point.encode(each, w) for each, w in zip(values, weights, strict=True)]), 1.0)
    error = found - weights @ values
    assert np.sqrt(np.mean(error**2)) == pytest.approx(point.expected(clients, 1.0), rel=0.02)
    assert 0.3 * point.worst(clients, 1.0) < np.abs(error).max() <= point.worst(clients, 1.0)


def test_more_cut_values_than_a_word_can_say_do_not_wrap_either() -> None:
    point = FixedPoint(1.0, 2**31)
    assert point.encode(np.full(50, 2.0), 1e-9)[-1] == 1  # of (2^32 − 1) // 2^31


def test_a_value_takes_four_bytes() -> None:
    assert coded_bytes(229_376) == 4 * 229_377 == len(FixedPoint(1.0, 25).encode(np.zeros(229_376), 0.04).tobytes())


def test_a_mask_follows_from_its_key_and_from_nothing_else() -> None:
    one, other = mask(bytes(32), 1000), mask(b"\1" + bytes(31), 1000)
    assert (one == mask(bytes(32), 1000)).all()
    assert (one == mask(bytes(32), 2000)[:1000]).all()
    assert not (one == other).any()
