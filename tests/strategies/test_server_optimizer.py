"""Server optimisers take the steps of slow loops over float64, on a core as on the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.core.errors import UserError
from fedsb.core.state import Name, State
from strategies.server_optimizer import ServerOptimizer, server_optimizer
from tests.strategies.uploads import gaussian, law


def path(optimizer: ServerOptimizer, steps: int, shape: tuple[int, int] = (3, 3)) -> list[Tensor]:
    """Return the states of a run whose clients' mean is a fixed function of the round."""
    current = State({Name("x", "R"): torch.zeros(shape, dtype=torch.float64)})
    found = []
    for number in range(steps):
        mean = State({name: t + gaussian(*shape, seed=number).double() for name, t in current.items()})
        current = optimizer.step(current, mean)
        found.append(current[Name("x", "R")])
    return found


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
