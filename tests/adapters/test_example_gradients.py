"""Gradients of each example, of every factor of every family that ever learns: a loop over examples through dense products in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.private import sampled_gradients
from fedsb.adapters import SPECS, LowRankLayer
from fedsb.adapters.linear import out_in
from fedsb.core.rng import torch_generator
from tests.strategies.dense import product_of

M, N, RANK, SCALE = 9, 12, 2, 0.6
BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(N, M), "conv1d": lambda: Conv1D(M, N)}
TURNS = [(name, turn) for name, spec in SPECS.items() if spec.factors for turn in range(1, spec.turns + 1)]


def filled(base: nn.Module, family: str, turn: int) -> LowRankLayer:
    """Return a layer whose factors are nowhere zero, and learn as in a turn."""
    layer = LowRankLayer(base, SPECS[family], RANK, SCALE)
    for i, role in enumerate(layer.spec.factors):
        weight = layer.weight_of(role)
        weight.data = torch.randn(weight.shape, generator=torch_generator(i, "filled"))
        weight.requires_grad_(role in layer.spec.learn(turn))
    return layer


def dense(layer: LowRankLayer, factors: dict[str, Tensor]) -> Tensor:
    """Return ``W0 + s ΔW`` (m, n) in float64; RAVAN's scalars are in its cores, as its product has it."""
    if "t" in factors:
        factors = {**factors, "H": factors["t"][:, None, None] * factors["H"]}
    weight: Tensor = out_in(layer.base, layer.base.weight).detach().double()  # type: ignore[arg-type]
    return weight + SCALE * product_of(layer.spec.name, factors)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("family", "turn"), TURNS)
def test_they_are_those_of_a_loop(family: str, turn: int, base: str) -> None:
    layer = filled(BASES[base](), family, turn)
    learns = layer.spec.learn(turn)
    assert learns
    x, weights = (torch.randn(3, 4, size, generator=torch_generator(size, "x")) for size in (N, M))
    bias = layer.base.bias.detach().double()  # type: ignore[union-attr, operator]
    wanted: dict[str, list[Tensor]] = {role: [] for role in learns}
    for i in range(3):
        factors = {role: layer.weight_of(role).detach().double().requires_grad_(role in learns) for role in layer.spec.factors}
        y = x[i].double() @ dense(layer, factors).T + bias
        gradients = torch.autograd.grad((y.square() * weights[i]).sum(), [factors[role] for role in learns])
        for role, gradient in zip(learns, gradients, strict=True):
            wanted[role].append(gradient)
    with sampled_gradients(layer):
        (layer(x).square() * weights).sum().backward()
        found = {role: layer.weight_of(role).grad_sample for role in learns}  # type: ignore[attr-defined]
    for role, together in found.items():
        apart = torch.stack(wanted[role])
        assert all(gradient.any() for gradient in apart)
        assert float((together.double() - apart).norm()) <= 1e-5 * float(apart.norm())
