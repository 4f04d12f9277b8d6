"""Sums rounded once: torch takes float64 to bfloat16 and float16 by way of float32, and what lies beside a tie there goes astray."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)
BLOCK = 2**17  # values at a time


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of float64 in another dtype of floats, each value the nearest one, ties to even.

    It takes the memory of what it returns, and on the way that of a block of 2^17 values, or of a row.
    """
    if dtype in WIDE:
        return wide.to(dtype)
    made = torch.empty_like(wide, dtype=dtype)
    target, source = (t if t.dim() else t[None] for t in (made, wide))
    rows = max(1, BLOCK * len(source) // max(1, source.numel()))
    for into, block in zip(torch.split(target, rows), torch.split(source, rows), strict=True):
        into.copy_(_to_odd(block))
    return made


def _to_odd(wide: Tensor) -> Tensor:
    """Return float64 in float32, rounded to odd (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819).

    A float32 whose last bit says that something was left out is on the same side of every tie of a narrow dtype as the value.
    """
    near = wide.to(torch.float32)
    back = near.to(torch.float64)
    inexact = back != wide
    bits = near.view(torch.int32)
    bits -= (inexact & (back.abs_() > wide.abs())).int()
    bits |= inexact
    return near
