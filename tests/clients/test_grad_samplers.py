"""Layers that Opacus' own hooks get wrong, or not at all: each example's gradient is that of plain autograd on it alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from clients.private import sampled_gradients
from fedsb.core.rng import torch_generator

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: nn.LayerNorm(6),
    "norm without bias": lambda: nn.LayerNorm(6, bias=False),
    "norm over two dimensions": lambda: nn.LayerNorm((4, 6)),
    "norm with a frozen weight": lambda: frozen(nn.LayerNorm(6), "weight"),
    "norm with a frozen bias": lambda: frozen(nn.LayerNorm(6), "bias"),
    "table": lambda: nn.Embedding(5, 6),
    "table with padding": lambda: nn.Embedding(5, 6, padding_idx=0),
}


def frozen(module: nn.Module, name: str) -> nn.Module:
    module.get_parameter(name).requires_grad_(False)
    return module


def inputs(layer: nn.Module, generator: torch.Generator) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, 5, (3, 4), generator=generator)
    return torch.randn(3, 4, 6, generator=generator)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_those_of_each_example_alone(kind: str) -> None:
    generator = torch_generator(0, "layers", kind)
    layer = LAYERS[kind]()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x, weights = inputs(layer, generator), torch.randn(3, 4, 6, generator=generator)
    trained = [p for p in layer.parameters() if p.requires_grad]
    alone = [torch.autograd.grad((layer(x[i : i + 1]).square() * weights[i]).sum(), trained) for i in range(3)]
    with sampled_gradients(layer):
        (layer(x).square() * weights).sum().backward()
        found = [p.grad_sample for p in trained]
    for i, together in enumerate(found):
        assert torch.allclose(together, torch.stack([gradients[i] for gradients in alone]), rtol=1e-5, atol=1e-6)
