"""Batched products with gradients of their own: what each block gives by itself, and what finite differences say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedsb.stack.batched import batched_linear, batched_lora


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("rows", "columns"), [(2, 5), (5, 2), (3, 3)])
@pytest.mark.parametrize("biased", [True, False])
def test_each_block_is_mapped_by_its_own_weight(rows, columns, biased):
    torch.manual_seed(0)
    x, weight, bias = _draw(4, 3, columns), _draw(4, rows, columns), _draw(4, rows) if biased else None
    expected = torch.stack([nn.functional.linear(x[i], weight[i], None if bias is None else bias[i]) for i in range(4)])
    assert torch.allclose(batched_linear(x, weight, bias), expected)
    assert torch.autograd.gradcheck(batched_linear, (x, weight, bias))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("of_data", [True, False])
def test_a_lora_layer_with_factors_a_block_is_the_sum_of_its_two_paths(biased, of_data):
    torch.manual_seed(0)
    base = nn.Linear(5, 4, bias=biased, dtype=torch.float64).requires_grad_(False)
    x, a, b = _draw(3, 6, 5), _draw(3, 2, 5), _draw(3, 4, 2)
    x.requires_grad_(of_data)
    expected = torch.stack([base(x[i]) + 0.7 * x[i] @ a[i].T @ b[i].T for i in range(3)])
    assert torch.allclose(batched_lora(x, base, a, b, 0.7), expected)
    assert torch.autograd.gradcheck(lambda *given: batched_lora(given[0], base, given[1], given[2], 0.7), (x, a, b))


@pytest.mark.parametrize("biased", [True, False])
def test_under_autocast_each_block_gives_the_bits_and_the_type_of_a_layer_alone(biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 6, 384), torch.randn(3, 5, 384), torch.randn(3, 5) if biased else None
    with torch.autocast("cpu", torch.bfloat16):
        together = batched_linear(x, weight, bias)
        alone = torch.stack([nn.functional.linear(x[i], weight[i], None if bias is None else bias[i]) for i in range(3)])
    assert together.dtype == alone.dtype == torch.bfloat16
    assert torch.allclose(together, alone, rtol=2**-8, atol=2**-8)
