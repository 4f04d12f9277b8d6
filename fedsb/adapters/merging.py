"""A trained model as plain weights ``W0 + residual + s · B R A``, with everything that the federation learned."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.layer import LowRankLayer, layers
from fedsb.adapters.linear import out_in
from fedsb.adapters.quantised import QuantisedLinear
from fedsb.adapters.rounding import WIDE, rounded


def merged_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a deep copy with plain layers in place of adapters; ``model`` stays as it is.

    Args:
        model: the adapted model.
        dtype: of the copy's floats, rounded once from the float64 sum; None keeps each weight's own.
    """
    # A filled memo makes deepcopy put the merged layer where it meets the adapted one, so no second copy of W0 is ever made.
    memo: dict[int, Any] = {id(layer): _merged(layer, dtype) for layer in layers(model).values()}
    adapted = {id(layer.base) for layer in layers(model).values()}
    memo |= {id(m): m.plain() for m in model.modules() if isinstance(m, QuantisedLinear) and id(m) not in adapted}
    made = copy.deepcopy(model, memo)
    return made if dtype is None else made.to(dtype)


def rounded_away(model: nn.Module, dtype: torch.dtype | None = None) -> float:
    """Return how far what a merge adds to the base is from what was learnt, relative to it: ``‖fl(W) - fl(W0) - ΔW‖ / ‖ΔW‖``.

    Over all adapted layers, in Frobenius norms; 0 without any, and into floats of 32 bits and more, which round next to nothing. Of a
    change that is small beside a weight's spacing of floats 1 is lost, and more: the merge then adds noise.
    """
    lost = whole = 0.0
    for layer in layers(model).values():
        kept = dtype or _plain(layer).weight.dtype
        if kept in WIDE:
            continue
        change = change_of(layer)
        start = layer.pristine.double()
        lost += float((rounded(start + change, kept).double() - rounded(start, kept).double() - change).square().sum())
        whole += float(change.square().sum())
    return (lost / whole) ** 0.5 if whole else 0.0


def product_of(layer: LowRankLayer) -> tuple[Tensor, Tensor]:
    """Split ``s · B R A`` into ``B`` and ``s · R A``, float64 on the CPU."""
    left, right = layer.spec.split(tuple(layer.weight_of(role).detach().to("cpu", torch.float64) for role in layer.spec.factors))
    return left, layer.scale * right


def change_of(layer: LowRankLayer) -> Tensor:
    """Return a layer's whole weight change (m, n): the product and the residual, float64 where its base lies."""
    left, right = product_of(layer)
    change = (left @ right).to(layer.pristine.device)
    residual = layer.residual
    return change if residual is None else change + residual.to(change)


def _merged(layer: LowRankLayer, dtype: torch.dtype | None) -> nn.Module:
    base = _plain(layer)
    weight: Tensor = base.weight
    dense = out_in(layer.base, layer.pristine.double() + change_of(layer))
    # A parameter of its own: the base's may be tied to an embedding, which must not change.
    merged = nn.Parameter(rounded(dense, dtype or weight.dtype).contiguous(), requires_grad=False)
    made: nn.Module = copy.deepcopy(base, {id(weight): merged})
    return made


def _plain(layer: LowRankLayer) -> Any:
    return layer.base.plain() if isinstance(layer.base, QuantisedLinear) else layer.base
