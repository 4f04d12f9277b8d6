"""A linear map for each block of rows: what stacked clients compute with their factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsb.core.precision import is_mixed


def batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map each block of rows by its own weight.

    Args:
        x: (k, rows, in).
        weight: (k, out, in).
        bias: (k, out).

    Returns:
        (k, rows, out).
    """
    if is_mixed(x):  # which a function of one's own would have to do without
        across = weight.transpose(1, 2)
        # In one product: a sum behind it would be of float32, where a linear layer alone gives the narrow type.
        return torch.bmm(x, across) if bias is None else torch.baddbmm(bias[:, None], x, across)
    out: Tensor = _BatchedLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias[:, None]


class _BatchedLinear(torch.autograd.Function):
    """A batched product whose backward pass lays the narrow side of a low-rank factor out as rows.

    The one that ``torch.bmm`` comes with makes (wide, narrow) products, which take CPUs three to six times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        narrow_input = weight.shape[2] < weight.shape[1]
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            for_x = _by_narrow(grad, weight) if narrow_input else torch.bmm(grad, weight)
        if ctx.needs_input_grad[1]:
            for_weight = torch.bmm(x.transpose(1, 2), grad).transpose(1, 2) if narrow_input else torch.bmm(grad.transpose(1, 2), x)
        return for_x, for_weight


def batched_lora(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``base(x) + s · B (A x)`` for blocks of rows with factors of their own, all over one frozen layer.

    Args:
        x: (k, rows, in).
        base: frozen.
        a: (k, r, in).
        b: (k, out, r).
        scale: s.

    Returns:
        (k, rows, out).
    """
    out: Tensor = _BatchedLoRA.apply(x, base.weight, base.bias, a, b, scale)  # type: ignore[no-untyped-call]
    return out


class _BatchedLoRA(torch.autograd.Function):
    """Adds the low-rank products in place, both ways: a separate sum would go over the largest tensors once more.

    What is of rank r is kept as (k, r, rows): products that write it so take CPUs half as long as those that write (k, rows, r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        h, b = torch.bmm(a, x.transpose(1, 2)).mul_(scale), b.transpose(1, 2).contiguous()
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scale = scale
        return F.linear(x, weight, bias).baddbmm_(h.transpose(1, 2), b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight, a, b, h) = grads, ctx.saved_tensors
        for_h = torch.bmm(b, grad.transpose(1, 2)).mul_(ctx.scale)
        for_x = (grad @ weight).baddbmm_(for_h.transpose(1, 2), a) if ctx.needs_input_grad[0] else None
        return for_x, None, None, torch.bmm(for_h, x), torch.bmm(h, grad).transpose(1, 2), None


def _by_narrow(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the batched ``grad @ weight`` for a (wide, narrow) weight."""
    return torch.bmm(weight.transpose(1, 2).contiguous(), grad.transpose(1, 2)).transpose(1, 2)
