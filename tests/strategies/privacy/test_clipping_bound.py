"""An adaptive bound follows its quantile by a noised count that shares the round's budget, and a fixed one stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import State
from strategies.privacy.mean import ClippingBound
from tests.strategies.privacy.private_means import HEADS, A, law, reducer, run


@law
@given(st.floats(0.01, 10), st.floats(1.001, 100))
def test_sum_and_count_together_cost_one_gaussian(z: float, margin: float) -> None:
    """Squared sensitivities over squared noises add up: 1 / z_Δ² of the sum and (1/2)² / σ_b² of the count."""
    bound = ClippingBound(1.0, quantile=0.5, count_noise=z / 2 * margin)
    assert bound.sum_multiplier(z) > z
    assert 1 / bound.sum_multiplier(z) ** 2 + 0.25 / bound.count_noise**2 == pytest.approx(1 / z**2, rel=1e-9)


def test_the_sum_of_an_adaptive_round_carries_more_noise() -> None:
    bound = ClippingBound(2.0, quantile=0.5, rate=0.2, count_noise=1.0)
    current = State({A: torch.zeros(100, 200)})
    aggregate = run(reducer(bound, 1.0, cohort=10), current, [])
    assert aggregate.extras["noise_std"] == pytest.approx(2 / math.sqrt(0.75) / 10)
    assert float(aggregate.state[A].std()) == pytest.approx(2 / math.sqrt(0.75) / 10, rel=0.02)
    assert aggregate.extras["clip_norm"] == 2.0 != bound.value


def test_the_count_has_its_noise() -> None:
    """With no client, ``log C`` moves by −η (N(0, σ_b²) / cohort + 1/2 − γ)."""
    generator, steps = torch_generator(1, "noise"), []
    for _ in range(3000):
        bound = ClippingBound(1.0, quantile=0.7, rate=0.2, count_noise=3.0)
        bound.update(0.0, 6, generator)
        steps.append((-math.log(bound.value) / 0.2 + 0.7 - 0.5) * 6)
    assert np.mean(steps) == pytest.approx(0, abs=4 * 3 / math.sqrt(3000))
    assert np.std(steps) == pytest.approx(3, rel=4 / math.sqrt(6000))


@law
@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.1, 0.9), st.sampled_from([-0.5, 0.5]))
def test_one_client_moves_the_count_by_a_half(inside: int, outside: int, quantile: float, half: float) -> None:
    """Seen from ``log C``: a step of η / (2 cohort), down for a client within the bound."""
    cohort, plain, more = 30, ClippingBound(1.0, quantile=quantile, rate=0.6), ClippingBound(1.0, quantile=quantile, rate=0.6)
    plain.update(inside / 2 - outside / 2, cohort, torch.Generator())
    more.update(inside / 2 - outside / 2 + half, cohort, torch.Generator())
    assert math.log(plain.value / more.value) == pytest.approx(0.6 * half / cohort, rel=1e-6)


@pytest.mark.parametrize("gone", [0.2, 3.0])
def test_a_client_that_is_zeroed_out_counts_as_one_that_does_not_answer(gone: float) -> None:
    current, reached = State({A: torch.zeros(1, 1)}), []
    for norms in ([0.3, 5.0, gone], [0.3, 5.0, 0.0], [0.3, 5.0]):
        bound = ClippingBound(1.0, quantile=0.5, rate=1.0, count_noise=7.0)
        run(reducer(bound, 1.0, 3), current, [State({A: torch.tensor([[norm]])}) for norm in norms])
        reached.append(-3 * math.log(bound.value))
    assert abs(reached[0] - reached[1]) == pytest.approx(0.5)
    assert reached[1] == pytest.approx(reached[2], abs=1e-12)


def followed(quantile: float, *, clients: int = 24, answering: int = 24) -> float:
    """Return the share of log-normal norms below the bound, averaged over the last 50 of 100 rounds."""
    norms = np.exp(np.random.default_rng(5).normal(size=clients))
    current = State({A: torch.zeros(1, 1), HEADS: torch.zeros(1)})
    uploads = [State({A: torch.tensor([[0.6 * size]]), HEADS: torch.tensor([0.8 * size])}) for size in norms]
    bound = ClippingBound(5.0, quantile=quantile, rate=0.3, count_noise=1e-3)
    rule, order, shares = reducer(bound, 1e-5, clients), np.random.default_rng(6), []
    for number in range(100):
        shares += [float(np.mean(norms <= bound.value))] if number >= 50 else []
        run(rule, current, [uploads[i] for i in order.choice(clients, answering, replace=False)])
    return float(np.mean(shares))


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_the_bound_finds_its_quantile(quantile: float) -> None:
    assert followed(quantile) == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize("quantile", [0.3, 0.6])
def test_missing_answers_push_the_quantile_away_from_a_half(quantile: float) -> None:
    assert followed(quantile, answering=12) == pytest.approx(0.5 + (quantile - 0.5) / 0.5, abs=0.05)


def test_a_fixed_bound_stays_and_draws_nothing() -> None:
    bound, generator = ClippingBound.fixed(1.5), torch_generator(1, "noise")
    before = generator.get_state()
    bound.update(10.0, 5, generator)
    assert bound == ClippingBound(1.5)
    assert torch.equal(before, generator.get_state())
    assert bound.sum_multiplier(1.1) == 1.1


@pytest.mark.parametrize("count_noise", [0.0, 0.3, 0.5])
def test_a_count_that_costs_more_than_the_round_is_refused(count_noise: float) -> None:
    bound = ClippingBound(1.0, quantile=0.5, rate=0.2, count_noise=count_noise)
    with pytest.raises(UserError, match=rf"^privacy\.count_noise={count_noise} must be above half of the noise multiplier 1, .*=flat$"):
        reducer(bound, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value": 0.0}, "clipping norm of 0.0"),
        ({"value": math.nan}, "clipping norm of nan"),
        ({"value": math.inf}, "clipping norm of inf"),
        ({"value": 1.0, "quantile": 1.0}, "privacy.quantile=1.0"),
        ({"value": 1.0, "quantile": 0.5, "count_noise": -1.0}, "privacy.count_noise=-1.0"),
        ({"value": 1.0, "quantile": 0.5, "rate": math.nan}, "privacy.quantile_lr=nan"),
    ],
)
def test_a_bound_outside_its_range_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClippingBound(**options)
