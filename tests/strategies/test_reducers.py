"""Reducers are means whatever the order of uploads, keep nothing of a round before, and hold no more than they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.core.state import State, WeightedSum
from strategies.decomposing import Cut, Decomposing
from strategies.methods.fedex_lora import FedExReducer
from strategies.methods.fedmomentum import PairAndRest
from strategies.methods.fedrot_lora import Aligned
from strategies.methods.flora import Stacking
from strategies.methods.hetlora import NormWeighted
from strategies.methods.lora_fair import Correcting
from strategies.reducers import Aggregate, PlainMean, Reducer
from tests.strategies.uploads import A, B, Case, added, cases, fine, gaussian, law, reduce, size

REDUCERS: dict[str, Callable[[], Reducer]] = {
    "mean": lambda: PlainMean(),
    "fedex": lambda: FedExReducer(5 / 3, fine),
    "truncated": lambda: FedExReducer(5 / 3, fine, truncate=2),
    "stack": lambda: Stacking(SPECS["lora"], 5 / 3),
    "decomposed": lambda: Decomposing(SPECS["lora"]),
    "rest": lambda: PairAndRest(SPECS["lora"], 5 / 3, Cut(1.0, "balanced"), fine, coarse=False, truncate=None),
    "rotated": lambda: Aligned("A", 0.5),
    "by norms": lambda: NormWeighted(SPECS["lora"]),
    "corrected": lambda: Correcting(SPECS["lora"], 0.01),
}
# Of what is decomposed, the product alone: its factors may change signs, or turn where singular values are equal.
TURNING = ("decomposed", "rest")


def product(aggregate: Aggregate) -> Tensor:
    """Return what state and log hold together."""
    there = 5 / 3 * aggregate.state[B].double() @ aggregate.state[A].double() if B in aggregate.state else torch.zeros(())
    return there + added(aggregate)


@pytest.mark.parametrize("kind", REDUCERS)
@law
@given(case=cases(), data=st.data(), factor=st.sampled_from([0.5, 1e-3, 7.0]))
def test_order_and_common_factors_of_weights_change_rounding_at_most(kind: str, case: Case, data: st.DataObject, factor: float) -> None:
    order = data.draw(st.permutations(range(len(case.uploads))))
    plain = reduce(REDUCERS[kind](), case.uploads, case.weights, case.uploads[0])
    weights = [factor * case.weights[i] for i in order]
    moved = reduce(REDUCERS[kind](), [case.uploads[i] for i in order], weights, case.uploads[0])
    for name, t in plain.state.items() if kind not in TURNING else ():
        assert torch.allclose(t, moved.state[name], rtol=3e-7, atol=1e-7)
    assert float((product(plain) - product(moved)).norm()) <= 2e-6 * size(Case(case.uploads, case.weights, 5 / 3, case.rank))


@pytest.mark.parametrize("kind", REDUCERS)
@law
@given(first=cases(), second=cases())
def test_a_round_forgets_the_round_before(kind: str, first: Case, second: Case) -> None:
    reducer = REDUCERS[kind]()
    reduce(reducer, first.uploads, first.weights, first.uploads[0])
    again = reduce(reducer, second.uploads, second.weights, second.uploads[0])
    fresh = reduce(REDUCERS[kind](), second.uploads, second.weights, second.uploads[0])
    for left, right in ((again.state, fresh.state), (again.log, fresh.log)):
        assert left.keys() == right.keys()
        assert all(torch.equal(t, right[name]) for name, t in left.items())
    assert again.extras == fresh.extras


@law
@given(cases())
def test_uploads_are_not_changed(case: Case) -> None:
    before = [{name: t.clone() for name, t in upload.items()} for upload in case.uploads]
    for make in REDUCERS.values():
        reduce(make(), case.uploads, case.weights, case.uploads[0])
    assert all(torch.equal(t, kept[name]) for kept, upload in zip(before, case.uploads, strict=True) for name, t in upload.items())


@law
@given(cases(), st.floats(-3, 3))
def test_a_mean_is_linear(case: Case, factor: float) -> None:
    """Means of ``x + c y`` are means of x plus c times means of y."""
    others = [State({name: gaussian(*t.shape, seed=i) for name, t in u.items()}) for i, u in enumerate(case.uploads)]
    sums = [
        State({name: t.double() + factor * y[name].double() for name, t in x.items()}) for x, y in zip(case.uploads, others, strict=True)
    ]
    x, y, both = (reduce(PlainMean(), u, case.weights).state for u in (case.uploads, others, sums))
    assert all(torch.allclose(t, x[name] + factor * y[name], rtol=1e-10, atol=1e-10) for name, t in both.items())


@law
@given(cases())
def test_a_mean_of_equal_uploads_is_that_upload(case: Case) -> None:
    aggregate = reduce(PlainMean(), [case.uploads[0]] * len(case.uploads), case.weights)
    assert all(torch.equal(t, case.uploads[0][name]) for name, t in aggregate.state.items())
    assert len(aggregate.log) == 0


def held_bytes(value: object) -> int:
    """Return the bytes of all tensors that an object holds."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, Mapping):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(held_bytes, value))
    return sum(map(held_bytes, vars(value).values())) if isinstance(value, WeightedSum) else 0


def test_a_mean_keeps_one_upload_and_fedex_the_factors_of_all() -> None:
    m, n, r = 40, 30, 2
    held: dict[str, dict[int, int]] = {"mean": {}, "fedex": {}}
    for count in (3, 30):
        reducers = {"mean": PlainMean(), "fedex": FedExReducer(1.0, fine, cohort=count)}
        for i in range(count):
            for reducer in reducers.values():
                reducer.add(State({A: gaussian(r, n, seed=i), B: gaussian(m, r, seed=i)}), 1.0)
        for name, reducer in reducers.items():
            held[name][count] = sum(map(held_bytes, vars(reducer).values()))
    one = 8 * r * (m + n)
    assert held["mean"][3] == held["mean"][30] <= 2 * one
    assert held["fedex"][30] - held["fedex"][3] == 27 * 4 * r * (m + n)
