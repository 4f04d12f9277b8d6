"""Prints tell tensors apart that were computed otherwise, and not those that were rounded otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.adapters.starts import orthogonal
from fedsb.core.prints import ALIKE, distance, prints
from fedsb.core.state import Name, State, squared_norm, subtract

SHAPES = {"x": (24, 16), "y": (16, 40)}
START = orthogonal(SHAPES, 4, 0).pick("A", "B")
B = Name("x", "B")


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_rounding_is_alike_and_another_column_is_not(seed: int) -> None:
    first = prints(START, seed)
    rounded = START.map(lambda t: t * (1 + 1e-6 * torch.sin(1e4 * t)))
    assert 0 < distance(first, prints(rounded, seed)) < ALIKE / 10
    for other in (-START[B][:, [0, 1, 2, 3]] * torch.tensor([1, -1, -1, -1]), START[B][:, [1, 0, 2, 3]]):
        assert distance(first, prints(START.merge(State({B: other})), seed)) > 10 * ALIKE


def test_their_distance_is_that_of_the_states_on_average() -> None:
    other = orthogonal(SHAPES, 4, 1).pick("A", "B")
    wanted = squared_norm(subtract(START, other)) / squared_norm(START)
    found = [distance(prints(START, seed), prints(other, seed)) ** 2 for seed in range(200)]
    assert sum(found) / 200 == pytest.approx(wanted, rel=0.15)


def test_who_has_none_is_like_nobody_who_has_some() -> None:
    assert prints(State(), 0) == ()
    assert distance((), ()) == 0
    assert distance((), prints(START, 0)) == math.inf
    assert not distance((math.nan,), (1.0,)) <= ALIKE
