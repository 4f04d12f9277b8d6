"""What the laws of the private mean share: clients of any size, a round of it, and a slow loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from strategies.privacy.mean import ClippingBound, PrivateMean
from strategies.reducers import Aggregate, Reducer

law = settings(max_examples=25, deadline=None)
A, B, HEADS = Name("x", "A"), Name("x", "B"), Name("c", HEAD)


@dataclass(frozen=True)
class Case:
    """What clients were sent, what they send back, and the bound on the difference."""

    current: State
    uploads: tuple[State, ...]
    clip: float


@st.composite
def cases(draw: st.DrawFn, max_clients: int = 5) -> Case:
    """Updates within the bound, around it and, up to float32's largest, far beyond it."""
    shapes = {A: (2, draw(st.integers(1, 6))), B: (draw(st.integers(1, 6)), 2), HEADS: (3,)}
    seed = draw(st.integers(0, 2**32))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e37]), min_size=1, max_size=max_clients))
    current = gaussian(shapes, seed)
    uploads = (State({n: current[n] + size * t for n, t in gaussian(shapes, seed + 1 + i).items()}) for i, size in enumerate(sizes))
    return Case(current, tuple(uploads), draw(st.sampled_from([1e-3, 0.5, 4.0, 1e3])))


def gaussian(shapes: dict[Name, tuple[int, ...]], seed: int) -> State:
    generator = torch_generator(seed, "test")
    return State({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def reducer(bound: ClippingBound | float, z: float = 0.0, cohort: int = 5, generator: torch.Generator | None = None) -> PrivateMean:
    bound = bound if isinstance(bound, ClippingBound) else ClippingBound.fixed(bound)
    return PrivateMean(
        bound=bound, noise_multiplier=z, cohort=cohort, generator=generator or torch_generator(0, "noise")
    )  # fmt: skip


def run(rule: Reducer, current: State, uploads: Sequence[State]) -> Aggregate:
    rule.begin(current)
    for upload in uploads:
        rule.add(upload, 1.0)
    return rule.finish()


def flat(state: State) -> list[float]:
    return [value for t in state.values() for value in t.double().reshape(-1).tolist()]
