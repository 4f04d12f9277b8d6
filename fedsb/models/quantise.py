"""Weights of a base in 8 or 4 bits, for the linear layers of the body: torchao's weight-only integers, bitsandbytes' floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from fedsb.adapters.quantised import QuantisedLinear
from fedsb.core.errors import UserError
from fedsb.models.bits_and_bytes import PIP
from fedsb.models.blocks4 import BLOCK, Blocks4

GROUP = 32  # columns that share a scale in int4
NONE = "none"


@dataclass(frozen=True)
class Kind:
    """A way to hold weights.

    Attributes:
        bits: of a weight, without its share of a scale.
        package: what does it.
        hold: from a matrix of floats to one that :func:`fedsb.adapters.quantised.dequantised` turns into floats again.
        fits: whether a matrix of (m, n) can be held so.
        limit: the same in words, after "layers with".
    """

    bits: int
    package: str
    hold: Callable[[Tensor], Tensor]
    fits: Callable[[int, int], bool]
    limit: str


def check_quantised(kind: str) -> None:
    """Hold that what quantises is installed.

    Raises:
        UserError: it is not.
    """
    if kind != NONE and find_spec(KINDS[kind].package) is None:
        raise UserError(f"model.quantize={kind} needs {KINDS[kind].package}, which is not installed: {PIP}, or leave it out")


def quantised(network: nn.Module, kind: str, where: str, home: str) -> str:
    """Quantise the linear layers of a network's body, in place, layer by layer.

    Embeddings, norms, what lies outside the body and the output's projection stay as they are.

    Args:
        network: as it was loaded; its tensors are not written to.
        kind: key of :data:`KINDS`, or ``none``.
        where: device on which they are quantised.
        home: device to which they go then, with their biases.

    Returns:
        A line on what was quantised; empty for ``none``.

    Raises:
        UserError: there is no such layer.
    """
    if kind == NONE:
        return ""
    how = KINDS[kind]
    body = f"{network.base_model_prefix}."
    linear = {name: m for name, m in network.named_modules() if type(m) is nn.Linear and name.startswith(body)}
    fitting = {name: m for name, m in linear.items() if how.fits(*m.weight.shape)}
    if not fitting:
        raise UserError(
            f"model.quantize={kind} finds no linear layer that it can hold in {type(network).__name__}"
            f"{f' (with {how.limit})' if linear else ''}; use model.quantize=none"
        )
    for name, module in fitting.items():
        weight = how.hold(module.weight.detach().to(where)).to(home)
        if module.bias is not None:
            module.bias.data = module.bias.data.to(home)
        network.set_submodule(name, QuantisedLinear.of(module, weight))
    rest = f"; {len(linear) - len(fitting)} others, which lack {how.limit}, stay" if len(fitting) < len(linear) else ""
    return f"model.quantize={kind}: {len(fitting)} layers are held in {how.bits} bits{rest}"


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


def _float4(code: str) -> Kind:
    limit = f"a number of weights that {BLOCK} divides"
    return Kind(4, "bitsandbytes", partial(Blocks4.of, code=code), lambda m, n: m * n % BLOCK == 0, limit)


KINDS: dict[str, Kind] = {
    "int8": Kind(8, "torchao", _int8, lambda m, n: True, "any width"),
    "int4": Kind(4, "torchao", _int4, lambda m, n: n % GROUP == 0, f"a width that {GROUP} divides"),
    "nf4": _float4("nf4"),
    "fp4": _float4("fp4"),
}
