"""int8 on the wire: how far a value is off, how many bytes it takes, and what it is when it is encoded again."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State
from fedsb.wire.arrays import decode_state, encode_arrays, layout_bytes, quantise
from fedsb.wire.blocks8 import BLOCK, coded_bytes, decode_blocks, encode_blocks
from fedsb.wire.byte_counts import array_bytes

law = settings(max_examples=60, deadline=None)
lengths = st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=5)
exponents = st.integers(-125, 120)


def drawn(sizes: list[int], exponent: int, seed: int) -> Tensor:
    """Draw tensors, each of a size of its own, around a power of two."""
    parts = [torch.randn(n, generator=torch_generator(seed + i, "test")) * 2.0 ** (exponent - 3 * i) for i, n in enumerate(sizes)]
    return torch.cat(parts)


def by_hand(values: list[float]) -> list[float]:
    """Round one block by the definition, in Python's float64."""
    largest = max(map(abs, values), default=0.0)
    if largest / 127 < 2.0**-126:
        return [0.0] * len(values)
    mantissa, exponent = math.frexp(torch.tensor(largest).div(127).item())
    scale = math.ldexp(math.ceil(mantissa * 2**16), exponent - 16)
    return [scale * round(float(torch.tensor(v) / torch.tensor(scale))) for v in values]


@law
@given(lengths, exponents, st.integers(0, 2**32))
def test_every_value_is_a_whole_number_of_its_blocks_steps(sizes: list[int], exponent: int, seed: int) -> None:
    flat = drawn(sizes, exponent, seed)
    decoded = decode_blocks(encode_blocks(flat, sizes), sizes)
    blocks = [block for part in torch.split(flat, sizes) for block in torch.split(part, BLOCK)]
    assert decoded.tolist() == [value for block in blocks for value in by_hand(block.tolist())]


@law
@given(lengths, exponents, st.integers(0, 2**32))
def test_it_is_off_by_half_a_step_and_encoded_again_it_has_the_same_bytes(sizes: list[int], exponent: int, seed: int) -> None:
    flat = drawn(sizes, exponent, seed)
    coded = encode_blocks(flat, sizes)
    decoded = decode_blocks(coded, sizes)
    for part, rounded in zip(torch.split(flat, sizes), torch.split(decoded, sizes), strict=True):
        for block, values in zip(torch.split(part, BLOCK), torch.split(rounded, BLOCK), strict=True):
            if len(block):
                assert float((block - values).abs().max()) <= max(float(block.abs().max()) / 254 * 1.0001, 127 * 2.0**-126)
    assert coded.dtype == torch.int8
    assert len(coded) == coded_bytes(sizes) == sum(n + 4 * math.ceil(n / BLOCK) for n in sizes)
    assert torch.equal(encode_blocks(decoded, sizes), coded)


@pytest.mark.parametrize("values", [[0.0] * 70, [3.4028234663852886e38, -1.0], [1e-45, 0.0], [-0.0]])
def test_zeros_and_the_ends_of_the_range(values: list[float]) -> None:
    flat = torch.tensor(values)
    decoded = decode_blocks(encode_blocks(flat, [len(values)]), [len(values)])
    assert torch.allclose(decoded, flat, rtol=1e-4, atol=float(flat.abs().max()) / 254 + 1e-40)
    assert torch.equal(encode_blocks(decoded, [len(values)]), encode_blocks(flat, [len(values)]))


def test_a_block_that_is_not_finite_spoils_itself_alone() -> None:
    flat = torch.full((3 * BLOCK,), 127.0)
    flat[BLOCK] = float("nan")
    decoded = decode_blocks(encode_blocks(flat, [len(flat)]), [len(flat)])
    assert [bool(block.isnan().all()) for block in torch.split(decoded, BLOCK)] == [False, True, False]
    assert torch.equal(decoded[:BLOCK], flat[:BLOCK])


def test_a_tensor_has_its_own_blocks_whatever_travels_with_it() -> None:
    small, large = torch.full((3, 5), 1e-4), torch.full((2, 2), 1e3)
    state = State({Name("x", "A"): large, Name("x", "R"): small, Name("c.bias", HEAD): torch.ones(1)})
    layout, record = Layout.of(state), encode_arrays(state, "int8")
    assert array_bytes(record) == layout_bytes(layout, "int8") == (4 + 4) + (15 + 4) + (1 + 4)
    decoded = decode_state(record, layout)
    for name, t in state.items():
        assert torch.equal(decoded[name], quantise(State({name: t}), "int8")[name])
        torch.testing.assert_close(decoded[name], t, rtol=1e-4, atol=0)
