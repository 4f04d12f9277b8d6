"""Sums rounded once: torch takes float64 to bfloat16 and float16 by way of float32, and what lies beside a tie there goes astray."""

from __future__ import annotations

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def rounded(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of float64 in another dtype of floats, each value the nearest one, ties to even.

    Narrow dtypes take the way of rounding to odd first (Boldo and Melquiond 2008, doi:10.1109/TC.2007.70819): a float32 whose last bit
    says that something was left out is on the same side of every tie as the value.
    """
    if dtype in WIDE:
        return wide.to(dtype)
    near = wide.to(torch.float32)
    back = near.to(torch.float64)
    inexact = back != wide
    bits = near.view(torch.int32) - (inexact & (back.abs() > wide.abs())).int()
    return (bits | inexact.int()).view(torch.float32).to(dtype)
