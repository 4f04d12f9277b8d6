"""What factors compute with: a linear layer for each factor of a chain, and one module for all of another product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from fedsb.adapters.geometry import Shapes
from fedsb.adapters.spec import AdapterSpec


class Product(nn.Module):
    """Factors whose product is no chain, as parameters under their roles' names: ``x Vᵀ Uᵀ``, with U (m, ρ) and V (ρ, n) of the family."""

    def __init__(self, shapes: Shapes, spec: AdapterSpec) -> None:
        super().__init__()
        self.spec = spec
        for role in spec.factors:
            self.register_parameter(role, nn.Parameter(torch.empty(shapes[role])))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        left, right = self.spec.split(tuple(getattr(self, role) for role in self.spec.factors))
        return F.linear(F.linear(x, right.to(x)), left.to(x))


def factor_of(shape: tuple[int, ...], beside: Tensor) -> nn.Linear:
    """Return a factor (out, in) in float32 on the device of the base weight; its values come later."""
    outputs, inputs = shape
    return skip_init(nn.Linear, inputs, outputs, bias=False, device=beside.device, dtype=torch.float32)  # type: ignore[no-untyped-call, no-any-return]
