"""Tensors as int8 on the wire: blocks of 64 values, one after the other within a tensor, each with a float32 scale of its own.

``x ≈ scale · q`` with ``q = round(x / scale)`` in [−127, 127], to the nearest, ties to even: beside error feedback nothing is gained by
chance, and equal values have equal bytes on every runtime. The scale is ``max |x| / 127``, rounded up to 16 significant bits: ``scale · q``
is then exact in float32, and what was decoded is encoded as the same bytes again. No block spans two tensors, so that a factor of small
values is not rounded by the scale of its neighbour; the last block of a tensor may be short. Values so small that their scale would be
below float32's normal numbers are zero. A block with a NaN or an infinity is NaN as a whole: whoever decodes it refuses it, as in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # values that share a scale
SCALE_BYTES = 4
_MOST = 127
_LEAST_SCALE = torch.finfo(torch.float32).tiny
_DROPPED = 0xFF  # the last bits of a scale's mantissa
# The largest scale of 16 significant bits whose 127-fold is finite.
_LARGEST_SCALE = float((torch.tensor(torch.finfo(torch.float32).max / _MOST).view(torch.int32) & ~_DROPPED).view(torch.float32))


def coded_bytes(sizes: Sequence[int]) -> int:
    """Return the bytes of tensors with so many values each."""
    return sum(sizes) + SCALE_BYTES * _blocks(sizes)


def encode_blocks(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Encode tensors that lie one after the other.

    Args:
        flat: (n,) in float32.
        sizes: number of values of each; they add up to n.

    Returns:
        int8 of :func:`coded_bytes`: the bytes of all scales, little-endian, and the values after them.
    """
    grid = _padded(flat, sizes).view(-1, BLOCK)
    scale = _scales(grid.abs().amax(1)) if len(grid) else flat.new_empty(0)
    q = (grid / scale[:, None]).round_().clamp_(-_MOST, _MOST).masked_fill_(~(scale > 0)[:, None], 0)
    values = _unpadded(q.to(torch.int8).view(-1), sizes)
    return torch.cat([torch.from_numpy(scale.numpy().astype("<f4", copy=False).view(np.int8)), values])


def decode_blocks(coded: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return what :func:`encode_blocks` encoded, as (n,) in float32.

    Raises:
        ValueError: the number of bytes is not that of such tensors.
    """
    if len(coded) != (wanted := coded_bytes(sizes)):
        raise ValueError(f"{len(coded)} bytes of int8 values and scales, expected {wanted} for {sum(sizes)} values")
    width = SCALE_BYTES * _blocks(sizes)
    scale = torch.from_numpy(coded[:width].clone().numpy().view("<f4").astype("=f4"))
    return _unpadded((_padded(coded[width:], sizes).view(-1, BLOCK).float() * scale[:, None]).view(-1), sizes)


def _scales(largest: Tensor) -> Tensor:
    wanted = largest / _MOST
    up = ((wanted.view(torch.int32) + _DROPPED) & ~_DROPPED).view(torch.float32).clamp(max=_LARGEST_SCALE)
    up = torch.where(wanted < _LEAST_SCALE, 0.0, up)
    return torch.where(wanted.isfinite(), up, torch.nan)


def _blocks(sizes: Sequence[int]) -> int:
    return sum(-(-size // BLOCK) for size in sizes)


def _padded(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Fill each tensor's last block up with zeros."""
    if all(size % BLOCK == 0 for size in sizes):
        return flat
    fill = flat.new_zeros(BLOCK)
    return torch.cat([piece for part in torch.split(flat, list(sizes)) for piece in (part, fill[: -len(part) % BLOCK])])


def _unpadded(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    if all(size % BLOCK == 0 for size in sizes):
        return flat
    parts = torch.split(flat, [-(-size // BLOCK) * BLOCK for size in sizes])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
