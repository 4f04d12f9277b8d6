"""What the laws of clipped sums share: losses of any size, and a loop over single examples in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clients.private_evidence import ClippedSum
from fedsb.adapters import layers
from fedsb.adapters.linear import out_in
from fedsb.adapters.starts import Side
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State, squared_norm, subtract
from tests.clients.evidence_cases import ROLES

Losses = Callable[[nn.Module, Any], Tensor]
SIDES: tuple[Side, Side] = ("right", "left")


def scaled_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Losses of a chain whose gradients are as large as one likes."""
    x, scales = batch
    return scales.to(x.dtype) * model(x).square().flatten(1).sum(1)


def parts(batch: Any, *counts: int) -> list[Any]:
    """Split (x, scales) into micro-batches."""
    return list(zip(*[t.split(counts) for t in batch], strict=True))


def inputs(scales: Sequence[float], *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(len(scales), *shape, generator=torch_generator(0, "inputs")), torch.tensor(scales)


def as_double(batch: Any) -> Any:
    return tuple(t.double() for t in batch) if isinstance(batch, tuple) else batch


def example_products(model: nn.Module, losses: Losses, examples: Sequence[Any], probes: State, side: Side) -> list[State]:
    """One state an example, from the dense float64 gradient of that example's loss alone."""
    model = copy.deepcopy(model).double().eval()
    for layer in layers(model).values():
        layer.active = False
        layer.base.weight.requires_grad_(True)
    found = []
    for example in examples:
        model.zero_grad()
        losses(model, as_double(example)).sum().backward()
        dense = {name: out_in(layer.base, layer.base.weight.grad) for name, layer in layers(model).items()}
        turned = {name: g if side == "right" else g.T for name, g in dense.items()}
        found.append(State({Name(name.module, ROLES[side]): turned[name.module] @ probe.double() for name, probe in probes.items()}))
    return found


def norm(state: State) -> float:
    return math.sqrt(squared_norm(state))


def clipped(products: Sequence[State], max_norm: float, normalise: bool) -> State:
    factors = [max_norm / norm(p) if normalise else min(1.0, max_norm / norm(p)) for p in products]
    return State({name: sum(f * p[name] for f, p in zip(factors, products, strict=True)) for name in products[0]})


def assert_clipped_sum(found: ClippedSum, products: Sequence[State], max_norm: float, normalise: bool) -> None:
    wanted = clipped(products, max_norm, normalise)
    assert set(found.sum) == set(wanted)
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in found.sum.values())
    assert norm(subtract(found.sum, wanted)) < 1e-5 * sum(min(norm(p), max_norm) for p in products) + 2e-5 * max_norm * normalise
    assert found.num_examples == len(products)
    # A norm that is C up to rounding may count either way.
    assert found.num_clipped in {sum(norm(p) > c * max_norm for p in products) for c in (1 - 1e-5, 1 + 1e-5)}
