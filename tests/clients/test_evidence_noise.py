"""Samples of an exchange are Poisson's, its noise covers empty ones too, and its signal is what was forecast."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from clients.private_evidence import ClippedSum, add_noise, clipped_sketch, poisson_sample
from fedsb.adapters import layers
from fedsb.adapters.starts import Side
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State, subtract
from fedsb.privacy.forecast import forecast_snr
from tests.clients.evidence_cases import ROLES, chain, probes_for
from tests.clients.sketch_cases import SIDES, inputs, norm, scaled_losses


@pytest.mark.parametrize("side", SIDES)
def test_an_empty_sample_gives_zeros_that_still_get_noise(side: Side) -> None:
    model = chain(nn.Linear, (120, 200, 150))
    probes = probes_for(model, side, 40)
    rows = {name: layer.shape[SIDES.index(side)] for name, layer in layers(model).items()}
    for batches in ([], [inputs([], 3, 120)]):
        found = clipped_sketch(model, batches, scaled_losses, probes=probes, side=side, max_norm=0.5)
        assert {name: tuple(t.shape) for name, t in found.sum.items()} == {Name(n, ROLES[side]): (m, 40) for n, m in rows.items()}
        assert (norm(found.sum), found.num_clipped, found.num_examples) == (0.0, 0, 0)
    release = add_noise(found, noise_multiplier=3.0, max_norm=0.5, expected=10.0, generator=torch_generator(0, "noise"))
    values = torch.cat([t.flatten() for t in release.values()])
    assert values.dtype == torch.float32
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert abs(float(values.mean())) < 4 * 0.15 / math.sqrt(len(values))
    assert float((values.abs() < 0.15).float().mean()) == pytest.approx(0.6827, abs=0.015)
    first, second = (t.flatten()[:4800] for t in release.values())
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.06


def test_noise_is_added_before_the_sum_is_rounded() -> None:
    """A float32 has steps of 2 from 2^24 on: a sum that was rounded first would not show that it is one longer."""
    total = ClippedSum(State({Name("m", "Y"): torch.full((100, 100), 2.0**24 + 1, dtype=torch.float64)}), 0, 1)
    release = add_noise(total, noise_multiplier=1.0, max_norm=1.0, expected=1.0, generator=torch_generator(0, "noise"))
    assert float((release[Name("m", "Y")].double() - 2.0**24).mean()) == pytest.approx(1, abs=6 * 1.2 / 100)


def test_noise_is_added_to_the_sum_in_sorted_order_and_divided_by_the_expected_number() -> None:
    names = [Name("b", "Y"), Name("a", "Y")]
    total = ClippedSum(State({name: torch.full((3, 2), 6.0) for name in names}), 0, 5)
    drawn = torch_generator(1, "noise")
    wanted = {name: ((6.0 + 0.5 * torch.randn(3, 2, generator=drawn, dtype=torch.float64)) / 4.0).float() for name in sorted(names)}
    found = add_noise(total, noise_multiplier=0.25, max_norm=2.0, expected=4.0, generator=torch_generator(1, "noise"))
    assert all(torch.equal(found[name], t) for name, t in wanted.items())
    for bad in ({"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"max_norm": -1.0}, {"expected": 0.0}):
        settings_ = {"noise_multiplier": 1.0, "max_norm": 1.0, "expected": 1.0, **bad}
        with pytest.raises(ValueError, match="noise_multiplier"):
            add_noise(total, generator=drawn, **settings_)


def test_poisson_samples_are_independent_draws() -> None:
    drawn = torch_generator(0, "sample")
    samples = [poisson_sample(50, 0.2, drawn) for _ in range(2000)]
    assert all(sample == sorted(set(sample)) and set(sample) <= set(range(50)) for sample in samples)
    sizes = torch.tensor([float(len(sample)) for sample in samples])
    # A binomial's mean and variance; samples of fixed size would have no variance.
    assert float(sizes.mean()) == pytest.approx(10, abs=0.3)
    assert float(sizes.var()) == pytest.approx(8, rel=0.15)
    hits = torch.bincount(torch.tensor([i for sample in samples for i in sample]), minlength=50) / 2000
    assert float((hits - 0.2).abs().max()) < 0.045
    assert poisson_sample(50, 0.2, torch_generator(0, "sample")) == samples[0]


def test_poisson_samples_at_the_ends() -> None:
    drawn = torch_generator(0, "sample")
    assert poisson_sample(4, 1.0, drawn) == [0, 1, 2, 3]
    assert poisson_sample(4, 0.0, drawn) == []
    assert poisson_sample(0, 0.5, drawn) == []
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            poisson_sample(4, rate, drawn)


@pytest.mark.parametrize("side", SIDES)
def test_aligned_examples_reach_the_forecast_and_others_stay_below(side: Side) -> None:
    model, sigma = chain(nn.Linear, (40, 70, 30)), 2.0
    probes = probes_for(model, side, 20)
    x, scales = inputs([1.0] * 8, 1, 40)
    shapes = {name: layer.shape for name, layer in layers(model).items()}
    forecast = forecast_snr(sigma, 0.3, 8, shapes, lambda m, n: min(20, m, n), side)

    def ratio(x: Tensor) -> float:
        found = clipped_sketch(model, [(x, scales)], scaled_losses, probes=probes, side=side, max_norm=0.3, normalise=True)
        noised = add_noise(found, noise_multiplier=sigma, max_norm=0.3, expected=1.0, generator=torch_generator(0, "noise"))
        return norm(found.sum) / norm(subtract(noised, found.sum))

    assert ratio(x[:1].expand_as(x)) == pytest.approx(forecast, rel=0.05)
    assert ratio(x) < 0.9 * forecast
    assert forecast_snr(0.0, 0.3, 8, shapes, lambda m, n: min(20, m, n), side) == math.inf
