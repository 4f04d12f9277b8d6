"""The private mean is that of a slow loop, and one client moves it by its bound at most."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, State, squared_norm, subtract
from strategies.privacy.mean import ClippingBound, PrivateSum
from tests.strategies.privacy.private_means import HEADS, A, Case, cases, flat, gaussian, law, reducer, run


def slow_mean(case: Case, cohort: int) -> list[float]:
    """Clip, sum and divide value by value."""
    start = flat(case.current)
    total = [0.0] * len(start)
    for upload in case.uploads:
        update = [new - old for new, old in zip(flat(upload), start, strict=True)]
        norm = math.sqrt(math.fsum(value * value for value in update))
        factor = min(1.0, case.clip / norm) if norm else 1.0
        total = [left + factor * right for left, right in zip(total, update, strict=True)]
    return [old + value / cohort for old, value in zip(start, total, strict=True)]


@law
@given(cases(), st.integers(1, 9))
def test_without_noise_it_is_that_of_a_slow_loop(case: Case, cohort: int) -> None:
    aggregate = run(reducer(case.clip, cohort=cohort), case.current, case.uploads)
    assert flat(aggregate.state) == pytest.approx(slow_mean(case, cohort), rel=1e-12, abs=1e-12 * case.clip)
    assert len(aggregate.log) == 0


@law
@given(cases(), st.data())
def test_one_client_moves_the_sum_by_at_most_the_bound(case: Case, data: st.DataObject) -> None:
    """Over factors and head jointly, whatever its size; its leaving changes no divisor."""
    left_out = data.draw(st.integers(0, len(case.uploads) - 1))
    others = [upload for i, upload in enumerate(case.uploads) if i != left_out]
    cohort = 7
    means = [run(reducer(case.clip, cohort=cohort), case.current, uploads).state for uploads in (case.uploads, others)]
    moved = cohort * math.sqrt(squared_norm(subtract(*means)))
    assert moved <= case.clip * (1 + 1e-9) + 1e-12
    distance = math.sqrt(squared_norm(subtract(case.uploads[left_out].map(torch.Tensor.double), case.current)))
    assert moved == pytest.approx(min(case.clip, distance), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_adds_zero(broken: float) -> None:
    current, upload, bad = (gaussian({A: (2, 3), HEADS: (3,)}, seed) for seed in (1, 2, 3))
    bad[HEADS][1] = broken
    bounds = [ClippingBound(1.0, quantile=0.7, rate=0.5) for _ in range(2)]
    alone = run(reducer(bounds[0]), current, [upload]).state
    both = run(reducer(bounds[1]), current, [upload, bad]).state
    assert flat(alone) == flat(both)
    assert bounds[0] == bounds[1]


def test_the_divisor_is_the_schedule_not_the_answers() -> None:
    current = State({A: torch.zeros(2, 2)})
    upload = State({A: torch.ones(2, 2)})
    for answered in range(5):
        aggregate = run(reducer(10.0, cohort=4), current, [upload] * answered)
        assert flat(aggregate.state) == [answered / 4] * 4
        assert aggregate.extras == {"clip_norm": 10.0, "noise_std": 0.0}


@law
@given(cases(), st.data())
def test_order_changes_rounding_at_most(case: Case, data: st.DataObject) -> None:
    uploads = data.draw(st.permutations(case.uploads))
    plain = run(reducer(case.clip, 0.8), case.current, case.uploads).state
    moved = run(reducer(case.clip, 0.8), case.current, uploads).state
    assert flat(moved) == pytest.approx(flat(plain), rel=1e-12, abs=1e-12 * case.clip)


@law
@given(cases(), cases())
def test_a_round_forgets_the_round_before(first: Case, second: Case) -> None:
    used = reducer(second.clip)
    run(used, first.current, first.uploads)
    again, fresh = (run(rule, second.current, second.uploads) for rule in (used, reducer(second.clip)))
    assert flat(again.state) == flat(fresh.state)
    assert again.extras == fresh.extras


@law
@given(cases())
def test_uploads_are_not_changed(case: Case) -> None:
    before = [flat(state) for state in (case.current, *case.uploads)]
    run(reducer(case.clip, 1.0), case.current, case.uploads)
    assert before == [flat(state) for state in (case.current, *case.uploads)]


def test_unequal_weights_are_refused_and_equal_ones_do_not_matter() -> None:
    current, upload = (gaussian({A: (2, 3)}, seed) for seed in (1, 2))
    rule = reducer(1.0)
    rule.begin(current)
    rule.add(upload, 30.0)
    with pytest.raises(ValueError, match=r"weights 30\.0 and 31\.0 in one private round; use federation\.weighting=uniform"):
        rule.add(upload, 31.0)
    rule.begin(current)
    rule.add(upload, 31.0)
    assert flat(rule.finish().state) == flat(run(reducer(1.0), current, [upload]).state)


def test_a_state_of_another_layout_is_refused() -> None:
    total = PrivateSum(Layout.of(State({A: torch.zeros(2, 3)})), clip=1.0, noise_multiplier=1.0, divisor=2, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"a state does not fit the private sum: A of 'x' is \(1, 3\), expected \(2, 3\)"):
        total.add(State({A: torch.zeros(1, 3)}))


def test_a_sum_is_released_once() -> None:
    total = PrivateSum(Layout.of(State({A: torch.zeros(2, 3)})), clip=1.0, noise_multiplier=1.0, divisor=2, generator=torch.Generator())
    total.mean()
    with pytest.raises(AssertionError):
        total.mean()


@law
@given(cases(), st.floats(0.1, 3), st.integers(1, 9))
def test_a_start_and_a_round_share_one_mechanism(case: Case, z: float, divisor: int) -> None:
    total = PrivateSum(
        Layout.of(case.current), clip=case.clip, noise_multiplier=z, divisor=divisor, generator=torch_generator(0, "noise")
    )  # fmt: skip
    norms = [total.add(upload) for upload in case.uploads]
    zero = case.current.map(torch.zeros_like)
    assert flat(total.mean()) == flat(run(reducer(case.clip, z, divisor), zero, case.uploads).state)
    assert norms == pytest.approx([math.dist(flat(upload), flat(zero)) for upload in case.uploads], rel=1e-12)
