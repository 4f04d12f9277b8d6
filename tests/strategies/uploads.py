"""What the laws of reducers share: uploads of some clients to draw, and their mean product and what is held of it, dense in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from fedsb.wire.arrays import quantise
from strategies.reducers import Aggregate, Reducer

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
