"""Weights in 4-bit floats: the nearest of the code's values times each block's largest magnitude, wherever a block begins and ends."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from fedsb.adapters.quantised import is_quantised, stored
from fedsb.core.rng import torch_generator
from fedsb.models.blocks4 import BLOCK, Blocks4

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
# The last two have blocks that end inside a row: at its half, and anywhere.
SHAPES = [(24, 64), (6, 128), (64, 2), (24, 48), (64, 34)]


def nf4() -> Tensor:
    """Return the 16 values, ascending, in float64: quantiles of a normal as QLoRA's code takes them, the largest of them 1."""
    offset = 0.9677083
    positive = torch.special.ndtri(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((positive, torch.zeros(1, dtype=torch.float64), negative)).sort().values
    return values / values.max()


def nearest(weight: Tensor) -> Tensor:
    """Round each block of a matrix to the nearest of the values times its largest magnitude, in float64."""
    blocks = weight.double().view(-1, BLOCK)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    chosen = nf4()[(scaled[..., None] - nf4()).abs().argmin(-1)]
    return (chosen * blocks.abs().amax(1, keepdim=True)).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_holds_the_nearest_values(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch_generator(0, "weight")).to(dtype)
    held = Blocks4.of(weight, "nf4").dequantize()
    assert (held.shape, held.dtype) == (weight.shape, dtype)
    assert torch.allclose(held.double(), nearest(weight), rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)


def test_rows_that_are_not_laid_out_one_after_the_other_are_held_alike() -> None:
    weight = torch.randn(64, 24, generator=torch_generator(0, "weight")).T
    assert torch.equal(Blocks4.of(weight, "nf4").dequantize(), Blocks4.of(weight.contiguous(), "nf4").dequantize())


def test_zeros_stay_zeros() -> None:
    assert not Blocks4.of(torch.zeros(4, 64), "nf4").dequantize().any()


@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_it_takes_half_a_byte_a_weight_and_four_a_block(code: str) -> None:
    assert sum(part.nbytes for part in stored(Blocks4.of(torch.randn(48, 64), code))) == 48 * 64 * (1 / 2 + 4 / BLOCK)


def test_copies_are_of_what_it_holds_and_sums_are_refused() -> None:
    held = Blocks4.of(torch.randn(4, 64), "nf4")
    for other in (held.clone(), held.detach(), held.to("cpu", copy=True), copy.deepcopy(torch.nn.Parameter(held, requires_grad=False))):
        assert is_quantised(other)
        assert torch.equal(other.dequantize(), held.dequantize())
    for wrong in (lambda: held + 1, lambda: held.to(torch.float16), lambda: held.copy_(held)):
        with pytest.raises(NotImplementedError, match="of a weight in 4 bits: dequantise it first"):
            wrong()
