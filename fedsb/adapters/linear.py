"""Which layers can carry an adapter, and how their weight lies: ``nn.Linear``, GPT-2's ``Conv1D``, and what computes as these do."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fedsb.adapters.quantised import QuantisedLinear, dequantised

# One row per supported kind of layer: does its weight lie as (out, in)?
OUT_IN: dict[type[nn.Module], bool] = {nn.Linear: True, Conv1D: False}


def is_adaptable(module: nn.Module) -> bool:
    """Tell whether a module can carry an adapter: it is a linear layer, or of a subclass that computes ``W0 x + bias`` as its parent does.

    Left out are those whose weight is no matrix of floats (quantised by others, parametrised), and those that compute something else
    (routers).
    """
    if not isinstance(module, tuple(OUT_IN)):
        return False
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return False
    if isinstance(module, QuantisedLinear) or type(module).forward in [kind.forward for kind in OUT_IN]:
        return True
    kind = (type(module), weight.is_meta)
    if kind not in _VERDICTS:
        _VERDICTS[kind] = _computes_as_linear(module)
    return _VERDICTS[kind]


# One trial a class: it passes over a whole weight.
_VERDICTS: dict[tuple[type[nn.Module], bool], bool] = {}


@torch.no_grad()
def _computes_as_linear(module: nn.Module) -> bool:
    """Try a layer with a forward of its own on a few rows."""
    weight, bias = out_in(module, module.weight), module.bias  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.shape[1], generator=draw).to(weight)
    try:
        own, plain = module(x), F.linear(x, weight, bias)  # type: ignore[arg-type]
        # Without values (meta) its shape has to tell.
        return isinstance(own, Tensor) and own.shape == plain.shape and (own.is_meta or torch.allclose(own, plain, rtol=1e-2, atol=1e-2))
    except Exception:  # it wants other arguments, or another kind of weight
        return False


def shape_of(base: nn.Module) -> tuple[int, int]:
    """Return (m, n) = (out, in) of an ``nn.Linear`` or ``Conv1D``."""
    rows, columns = base.weight.shape  # type: ignore[misc]
    return (rows, columns) if _is_out_in(base) else (columns, rows)


def base_weight(base: nn.Module) -> Tensor:
    """Return W0 of a layer, quantised or not, as (out, in) in float32."""
    return out_in(base, dequantised(base.weight)).to(torch.float32)  # type: ignore[arg-type]


def out_in(base: nn.Module, weight: Tensor) -> Tensor:
    """View a stored weight as (out, in), or an (out, in) matrix as it is stored: the transposition is its own inverse."""
    return weight if _is_out_in(base) else weight.T


def _is_out_in(base: nn.Module) -> bool:
    return next(lies for kind, lies in OUT_IN.items() if isinstance(base, kind))
