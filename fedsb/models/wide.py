"""A trained head in float32 beside a body in bfloat16 or float16: its small steps would be rounded away in those."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters import NARROW


def widen(network: nn.Module, names: Collection[str]) -> None:
    """Make parameters float32 copies of their own, in place, and let the modules that own them compute in float32.

    What a module of the body puts out is in the body's dtype again, for the frozen layers behind it. A parameter that was narrow keeps the
    values that it had. Call it before adapters, whose factors are float32 anyway, are put on.

    Args:
        network: as it was loaded; its tensors may be shared with other processes, which map them read-only.
        names: of parameters of the network.
    """
    parameters = dict(network.named_parameters())
    narrow: dict[int, torch.dtype] = {}
    for name in names:
        p = parameters[name]
        if p.dtype in NARROW:
            narrow[id(p)] = p.dtype
        p.data = p.data.to(torch.float32, copy=True) if p.dtype in NARROW else p.data.clone()
    body = f"{network.base_model_prefix}."
    for name, module, dtype in _owners(network, narrow):
        module.register_forward_pre_hook(_widened)
        if name.startswith(body):
            module.register_forward_hook(partial(_narrowed, dtype))


def _owners(network: nn.Module, narrow: dict[int, torch.dtype]) -> Iterator[tuple[str, nn.Module, torch.dtype]]:
    """Yield the modules that hold such a parameter; of a tied one there are several."""
    for name, module in network.named_modules():
        held = [narrow[id(p)] for p in module.parameters(recurse=False) if id(p) in narrow]
        if held:
            yield name, module, held[0]


def _widened(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)


def _narrowed(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(dtype) if isinstance(output, Tensor) and output.is_floating_point() else output
