"""Frozen linear layers whose weights are held in 8 or 4 bits, and how anybody reads a base's weights, quantised or not.

A quantised weight is a tensor subclass: it looks like an (out, in) matrix of floats and holds integers and scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def is_quantised(weight: Tensor) -> bool:
    """Tell whether a weight is no plain tensor of floats, but one that can be turned into it."""
    return type(weight) not in (Tensor, nn.Parameter) and hasattr(type(weight), "__tensor_flatten__")


def dequantised(weight: Tensor) -> Tensor:
    """Return a weight as floats, as it lies: the tensor itself unless it is quantised."""
    # Not of its detached self: in inference mode torch makes none of a wrapper.
    return weight.dequantize() if is_quantised(weight) else weight.data


def stored(weight: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a weight consists of."""
    if not is_quantised(weight):
        yield weight
        return
    names: tuple[list[str], Any] = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names[0]:
        yield from stored(getattr(weight, name))


class QuantisedLinear(nn.Linear):
    """A frozen ``nn.Linear`` that makes its matrix of floats for each product anew, in the backward pass too: none is held in between.

    torchao's own product would hold one of every layer until its backward pass, or has none.
    """

    @classmethod
    def of(cls, plain: nn.Linear, weight: Tensor) -> QuantisedLinear:
        """Return the layer with a quantised weight in place of a plain one's, whose bias it shares."""
        made = cls(plain.in_features, plain.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.bias = plain.bias
        return made

    def plain(self) -> nn.Linear:
        """Return an ordinary layer with the dequantised weight."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(dequantised(self.weight), requires_grad=False)
        made.bias = self.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        out: Tensor = _Dequantised.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, dequantised(layer.weight), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return (grad @ dequantised(ctx.layer.weight).to(grad.dtype)).to(ctx.dtype), None
