"""Reducers and server optimisers against dense float64 oracles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS, Layouts
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State, WeightedSum
from fedsb.wire.arrays import quantise
from strategies import FedExLoRA, Participation
from strategies.methods.fedex_lora import FedExReducer
from strategies.reducers import Aggregate, PlainMean, Reducer
from strategies.server_optimizer import ServerOptimizer, server_optimizer

law = settings(max_examples=25, deadline=None)
fine = partial(quantise, dtype="float32")
coarse = partial(quantise, dtype="bfloat16")
A, B, HEADS = Name("x", "A"), Name("x", "B"), Name("c", HEAD)


@dataclass(frozen=True)
class Case:
    """Uploads of some clients: B (m, r), A (r, n) and a head, with weights."""

    uploads: tuple[State, ...]
    weights: tuple[float, ...]
    scale: float
    rank: int

    @property
    def shares(self) -> list[float]:
        return [weight / sum(self.weights) for weight in self.weights]


@st.composite
def cases(draw: st.DrawFn, min_clients: int = 1) -> Case:
    rank = draw(st.integers(1, 3))
    m, n = draw(st.tuples(st.integers(rank, 14), st.integers(rank, 14)))
    weights = draw(st.lists(st.integers(1, 500), min_size=min_clients, max_size=5))
    seed, spread = draw(st.integers(0, 2**32)), draw(st.sampled_from([1.0, 0.1]))
    common = {name: gaussian(*shape, seed=seed) for name, shape in ((A, (rank, n)), (B, (m, rank)), (HEADS, (3,)))}
    uploads = tuple(
        State({name: t + spread * gaussian(*t.shape, seed=seed + 1 + i) for name, t in common.items()}) for i in range(len(weights))
    )
    return Case(uploads, tuple(map(float, weights)), draw(st.sampled_from([0.3, 1.0, 5 / 3])), rank)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def reduce(reducer: Reducer, uploads: Sequence[State], weights: Sequence[float], current: State | None = None) -> Aggregate:
    reducer.begin(current or State())
    for upload, weight in zip(uploads, weights, strict=True):
        reducer.add(upload, weight)
    return reducer.finish()


def wanted(case: Case) -> Tensor:
    """Return ``s Σ w_i B_i A_i`` densely in float64."""
    dense = [share * upload[B].double() @ upload[A].double() for share, upload in zip(case.shares, case.uploads, strict=True)]
    return case.scale * torch.stack(dense).sum(0)


def added(aggregate: Aggregate) -> Tensor | float:
    """Return ``U V`` densely in float64, or 0 where there is none."""
    if Name("x", "U") not in aggregate.log:
        return 0.0
    return aggregate.log[Name("x", "U")].double() @ aggregate.log[Name("x", "V")].double()


def held(case: Case, aggregate: Aggregate) -> Tensor:
    return case.scale * aggregate.state[B].double() @ aggregate.state[A].double() + added(aggregate)


def size(case: Case) -> float:
    """Return the norm that rounding is relative to: means and updates may cancel, their terms do not."""
    return case.scale * max(float(u[B].double().norm() * u[A].double().norm()) for u in case.uploads)


@law
@given(cases())
def test_fedex_holds_the_mean_of_the_products(case: Case) -> None:
    aggregate = reduce(FedExReducer(case.scale, fine), case.uploads, case.weights)
    error = float((held(case, aggregate) - wanted(case)).norm())
    assert error <= 1e-6 * size(case)
    assert error <= 1e-5 * float(wanted(case).norm()) + 1e-7 * size(case)
    clients = len(case.uploads)
    rank = aggregate.log[Name("x", "U")].shape[1] if len(aggregate.log) else 0
    assert rank == (clients - 1) * case.rank == fedex().residual_rank([case.rank] * clients)
    assert aggregate.extras["residual_rank"] == rank


@law
@given(cases())
def test_fedex_is_exact_over_a_wire_that_rounds(case: Case) -> None:
    """Means rounded to bfloat16 are off by 2^-9; the residual takes that up."""
    aggregate = reduce(FedExReducer(case.scale, coarse, coarse=True), case.uploads, case.weights)
    assert all(torch.equal(t, coarse(State({name: t}))[name]) for name, t in aggregate.state.items())
    assert float((held(case, aggregate) - wanted(case)).norm()) <= 1e-6 * size(case)
    assert aggregate.extras["residual_rank"] == fedex(wire_dtype="bfloat16").residual_rank([case.rank] * len(case.uploads))


@law
@given(cases(min_clients=2), st.integers(1, 6))
def test_a_truncated_residual_is_the_best_of_its_rank(case: Case, kept: int) -> None:
    """Eckart-Young: the error of the best rank-r' matrix is the norm of the singular values left out."""
    aggregate = reduce(FedExReducer(case.scale, fine, truncate=kept), case.uploads, case.weights)
    mean = [torch.stack([s * u[name].double() for s, u in zip(case.shares, case.uploads, strict=True)]).sum(0) for name in (B, A)]
    residual = wanted(case) - case.scale * mean[0] @ mean[1]
    values = torch.linalg.svdvals(residual)
    whole = (len(case.uploads) - 1) * case.rank
    rank = min(kept, *residual.shape) if kept < whole else whole
    assert aggregate.log[Name("x", "U")].shape[1] == rank
    best = float(values[rank:].norm())
    assert float((added(aggregate) - residual).norm()) == pytest.approx(best, rel=1e-4, abs=1e-6 * size(case))
    # Nothing is truncated where the rank allows all of it, whatever rounding says.
    dense = best / float(values.norm()) if kept < whole else 0.0
    assert aggregate.extras["truncation_error"] == pytest.approx(dense, rel=1e-4, abs=1e-5)


REDUCERS: dict[str, Callable[[], Reducer]] = {
    "mean": lambda: PlainMean(),
    "fedex": lambda: FedExReducer(5 / 3, fine),
    "truncated": lambda: FedExReducer(5 / 3, fine, truncate=2),
}


@pytest.mark.parametrize("kind", REDUCERS)
@law
@given(case=cases(), data=st.data(), factor=st.sampled_from([0.5, 1e-3, 7.0]))
def test_order_and_common_factors_of_weights_change_rounding_at_most(kind: str, case: Case, data: st.DataObject, factor: float) -> None:
    order = data.draw(st.permutations(range(len(case.uploads))))
    plain = reduce(REDUCERS[kind](), case.uploads, case.weights)
    moved = reduce(REDUCERS[kind](), [case.uploads[i] for i in order], [factor * case.weights[i] for i in order])
    for name, t in plain.state.items():
        assert torch.allclose(t, moved.state[name], rtol=3e-7, atol=1e-7)
    same_scale = Case(case.uploads, case.weights, 5 / 3, case.rank)
    if kind != "mean":
        assert float((held(same_scale, plain) - held(same_scale, moved)).norm()) <= 2e-6 * size(same_scale)


@pytest.mark.parametrize("kind", REDUCERS)
@law
@given(first=cases(), second=cases())
def test_a_round_forgets_the_round_before(kind: str, first: Case, second: Case) -> None:
    reducer = REDUCERS[kind]()
    reduce(reducer, first.uploads, first.weights)
    again = reduce(reducer, second.uploads, second.weights)
    fresh = reduce(REDUCERS[kind](), second.uploads, second.weights)
    for left, right in ((again.state, fresh.state), (again.log, fresh.log)):
        assert left.keys() == right.keys()
        assert all(torch.equal(t, right[name]) for name, t in left.items())
    assert again.extras == fresh.extras


@law
@given(cases())
def test_uploads_are_not_changed(case: Case) -> None:
    before = [{name: t.clone() for name, t in upload.items()} for upload in case.uploads]
    for make in REDUCERS.values():
        reduce(make(), case.uploads, case.weights)
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


def path(optimizer: ServerOptimizer, steps: int, shape: tuple[int, int] = (3, 3)) -> list[Tensor]:
    """Return the states of a run whose clients' mean is a fixed function of the round."""
    current = State({Name("x", "R"): torch.zeros(shape, dtype=torch.float64)})
    found = []
    for number in range(steps):
        mean = State({name: t + gaussian(*shape, seed=number).double() for name, t in current.items()})
        current = optimizer.step(current, mean)
        found.append(current[Name("x", "R")])
    return found


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


def test_plain_sgd_with_rate_one_is_averaging() -> None:
    optimizer = server_optimizer("momentum", lr=1.0, momentum=0.0)
    assert optimizer is not None
    current, mean = (State({Name("x", "R"): gaussian(3, 3, seed=s)}) for s in (1, 2))
    assert torch.allclose(optimizer.step(current, mean)[Name("x", "R")], mean[Name("x", "R")].double(), rtol=1e-12, atol=1e-12)
    assert server_optimizer("none") is None


def test_momentum_is_that_of_a_slow_loop() -> None:
    """v ← β v + (mean − current), current ← current + η v."""
    optimizer = server_optimizer("momentum", lr=0.5, momentum=0.9)
    assert optimizer is not None
    velocity = state = torch.zeros(3, 3, dtype=torch.float64)
    for number, found in enumerate(path(optimizer, 5)):
        velocity = 0.9 * velocity + gaussian(3, 3, seed=number).double()
        state = state + 0.5 * velocity
        assert torch.allclose(found, state, rtol=1e-12, atol=1e-12)


def test_adam_is_that_of_a_slow_loop() -> None:
    """Kingma and Ba's update with bias correction, on the negative mean update."""
    optimizer = server_optimizer("adam", lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    assert optimizer is not None
    first = second = state = torch.zeros(3, 3, dtype=torch.float64)
    for number, found in enumerate(path(optimizer, 5)):
        gradient = -gaussian(3, 3, seed=number).double()
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        t = number + 1
        state = state - 0.1 * (first / (1 - 0.9**t)) / ((second / (1 - 0.99**t)).sqrt() + 1e-3)
        assert torch.allclose(found, state, rtol=1e-9, atol=1e-12)


@law
@given(st.integers(0, 2**32), st.sampled_from([(7, 4), (4, 9)]))
def test_momentum_on_the_core_is_momentum_on_the_weight(seed: int, shape: tuple[int, int]) -> None:
    """B and A are fixed, so ``B v(R) A = v(B R A)``."""
    m, n = shape
    left, right = gaussian(m, 2, seed=seed).double(), gaussian(2, n, seed=seed + 1).double()
    small, large = (server_optimizer("momentum", lr=0.7, momentum=0.9) for _ in range(2))
    assert small is not None
    assert large is not None
    core, weight = State({Name("x", "R"): torch.zeros(2, 2)}), State({Name("x", "R"): torch.zeros(m, n)})
    for number in range(4):
        update = gaussian(2, 2, seed=seed + 2 + number).double()
        core = small.step(core, State({name: t.double() + update for name, t in core.items()}))
        weight = large.step(weight, State({name: t.double() + left @ update @ right for name, t in weight.items()}))
        assert torch.allclose(left @ core[Name("x", "R")] @ right, weight[Name("x", "R")], rtol=1e-9, atol=1e-9)


def test_an_unknown_server_optimiser_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown federation\.server_optimizer\.name 'adan' \(did you mean 'adam'\?\); choose from adam, "):
        server_optimizer("adan")


def fedex(**options: object) -> FedExLoRA:
    nothing = Layout(())
    layouts = Layouts(nothing, (nothing,), nothing)
    return FedExLoRA(spec=SPECS["lora"], layouts=layouts, scale=1.0, participation=Participation(("a",)), **options)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_server_optimiser_with_fedex_is_refused(name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"server_optimizer is not defined with FedExLoRA: .* use federation\.server_optimizer\.name=none",
    ):
        fedex(server_optimizer=server_optimizer(name))


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_a_truncation_to_no_rank_is_refused(rank: float) -> None:
    with pytest.raises(UserError, match=r"method\.options\.truncate=.* must be a rank of at least 1, or null"):
        fedex(truncate=rank)
