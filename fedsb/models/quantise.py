"""Weights of a base in 8 or 4 bits: torchao's weight-only integers, for the linear layers of the body."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fedsb.adapters.quantised import QuantisedLinear
from fedsb.core.errors import UserError

GROUP = 32  # columns that share a scale in 4 bits
NONE = "none"


def check_quantised(kind: str) -> None:
    """Hold that what quantises is installed.

    Raises:
        UserError: it is not.
    """
    if kind != NONE and find_spec("torchao") is None:
        raise UserError(f"model.quantize={kind} needs torchao, which is not installed: pip install 'fedsb[quant]', or leave it out")


def quantised(network: nn.Module, kind: str, where: str) -> str:
    """Quantise the linear layers of a network's body, in place, layer by layer where the network will compute.

    Embeddings, norms, what lies outside the body and the output's projection stay as they are.

    Args:
        network: as it was loaded; its tensors are not written to.
        kind: key of :data:`KINDS`, or ``none``.
        where: device.

    Returns:
        A line on what was quantised; empty for ``none``.

    Raises:
        UserError: there is no such layer.
    """
    if kind == NONE:
        return ""
    body = f"{network.base_model_prefix}."
    linear = {name: m for name, m in network.named_modules() if type(m) is nn.Linear and name.startswith(body)}
    fitting = {name: m for name, m in linear.items() if kind != "int4" or m.in_features % GROUP == 0}
    if not fitting:
        raise UserError(
            f"model.quantize={kind} finds no linear layer that it can hold in {type(network).__name__}"
            f"{f' (widths that {GROUP} divides)' if linear else ''}; use model.quantize=none"
        )
    for name, module in fitting.items():
        weight = KINDS[kind](module.weight.detach().to(where))
        if module.bias is not None:
            module.bias.data = module.bias.data.to(where)
        network.set_submodule(name, QuantisedLinear.of(module, weight))
    rest = f"; {len(linear) - len(fitting)} others, whose width {GROUP} does not divide, stay" if len(fitting) < len(linear) else ""
    return f"model.quantize={kind}: {len(fitting)} layers are held in {kind[3:]} bits{rest}"


def _int8(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8WeightOnlyConfig  # an extra, and seconds to import

    return _by_torchao(weight, Int8WeightOnlyConfig())


def _int4(weight: Tensor) -> Tensor:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    from fedsb.models.packed4 import Packed4

    loose = _by_torchao(weight, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))  # type: ignore[attr-defined]
    return Packed4.of(loose.qdata, loose.scale)  # type: ignore[attr-defined]


def _by_torchao(weight: Tensor, config: object) -> Tensor:
    from torchao.quantization import quantize_

    m, n = weight.shape
    holder = nn.Sequential(nn.Linear(n, m, bias=False, device="meta"))
    holder[0].weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, config)
    made: Tensor = holder[0].weight.detach()
    return made


KINDS: dict[str, Callable[[Tensor], Tensor]] = {"int8": _int8, "int4": _int4}
