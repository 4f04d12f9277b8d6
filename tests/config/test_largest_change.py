"""No training moves a value further than the bound that a secure sum takes from the configuration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsb.config.compose import load
from fedsb.config.largest_change import BETA1, BETA2, SLACK, largest_change
from fedsb.config.schema import TrainConfig
from fedsb.models.fit import OPTIMIZERS

CONFIG = load(["privacy=example", "privacy.noise_multiplier=1.5", "privacy.max_grad_norm=0.5", "init.kind=orthogonal"])
STEPS = 40


def bound(train: TrainConfig) -> float | None:
    return largest_change(train, CONFIG.privacy, 1)


def moved(train: TrainConfig, gradients: np.ndarray) -> float:
    """Return how far a value goes with these gradients."""
    value = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = OPTIMIZERS[train.optimizer]([value], train)
    for gradient in gradients:
        value.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    return abs(float(value.detach()))


def longest_step(train: TrainConfig, gradients: np.ndarray) -> float:
    return moved(train, gradients) - moved(train, gradients[:-1])


def test_adamw_goes_no_further_whatever_the_gradients_are() -> None:
    train = replace(CONFIG.train, optimizer="adamw", local_steps=STEPS, lr=0.01)
    most = bound(train)
    assert most is not None
    draw = np.random.default_rng(0)
    tried = [np.full(STEPS, 1e-3), np.geomspace(1e-9, 1.0, STEPS), *(np.abs(draw.standard_cauchy(STEPS)) for _ in range(20))]
    assert all(moved(train, gradients) <= most for gradients in tried)
    # The gradients of equality in Cauchy's and Schwarz's inequality: the last step is as long as a step can be.
    worst = (BETA1 / BETA2) ** np.arange(STEPS)[::-1]
    shorter = bound(replace(train, local_steps=STEPS - 1))
    assert shorter is not None
    assert longest_step(train, worst) == pytest.approx((most - shorter) / SLACK, rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_goes_no_further_than_its_clipped_gradients_carry_it(momentum: float) -> None:
    train = replace(CONFIG.train, optimizer="sgd", local_steps=STEPS, lr=0.1, momentum=momentum, clip_norm=0.3)
    most = bound(train)
    assert most is not None
    assert 0.6 * most < moved(train, np.full(STEPS, 0.3)) <= most


def test_noised_gradients_stay_below_what_clipping_and_noise_allow() -> None:
    """A sample of twice the expected size, all along one value, and a million draws of the noise."""
    train = replace(CONFIG.train, optimizer="sgd", local_steps=1, lr=1.0, batch_size=10)
    most, p = bound(train), CONFIG.privacy
    assert most is not None
    noise = np.random.default_rng(1).normal(0, p.noise_multiplier * p.max_grad_norm, 10**6)
    assert (np.abs(20 * p.max_grad_norm + noise) / 10 < most).all()


@pytest.mark.parametrize(
    "train",
    [
        {"weight_decay": 0.1},
        {"optimizer": "adamw8bit"},
        {"optimizer": "sgd", "prox_mu": 0.1},
        {"optimizer": "sgd", "preconditioner": "riemannian"},
    ],
)
def test_what_has_no_bound_has_none(train: dict[str, object]) -> None:
    assert bound(replace(CONFIG.train, **train)) is None


def test_the_most_examples_of_a_client_make_the_steps() -> None:
    train = replace(CONFIG.train, local_steps=None, local_epochs=2, batch_size=10)
    assert largest_change(train, CONFIG.privacy, 95) == bound(replace(train, local_steps=20))
