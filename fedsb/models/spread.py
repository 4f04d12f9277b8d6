"""A network over several GPUs: each layer whole on one of them with its factors and what stands beside its base, all else on the first.

So batches go to the first GPU and outputs come from it, and between two GPUs go a batch's hidden states alone, and masks and positions.
accelerate's hooks do the like; but they count a quantised weight as floats, put other tensors in the place of parameters (an adapted layer
keeps its W0), and leave on a copy of the model methods that move the original.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.quantised import stored
from fedsb.config.schema import ModelConfig
from fedsb.core.errors import UserError
from fedsb.models.cards import cards_from, cut, free_on
from fedsb.models.heads import drawn_in, note, remarks_on
from fedsb.models.loading import is_spread
from fedsb.models.lookups import try_body

TRAINED = 4  # a weight that learns has a gradient and two moments


def settle(network: nn.Module, model: ModelConfig, device: str) -> None:
    """Move a network that waits on the CPU to the GPUs where its configuration says so, and note it.

    Raises:
        UserError: see :func:`spread`.
    """
    if model.device_map is None or device == "meta":
        return
    said = "model.device_map=auto: on a CPU the model lies whole"
    if is_spread(model, device):
        cards = cards_from(device)
        said = spread(network, cards, free_on(cards))
    note(network, drawn_in(network), *remarks_on(network), said)


def spread(network: nn.Module, devices: Sequence[torch.device], rooms: Sequence[int]) -> str:
    """Move a network with its adapters on to some devices, in place: to the first alone where it fits.

    Args:
        network: on the CPU.
        devices: in the order in which layers go to them.
        rooms: free bytes of each.

    Returns:
        A line on what lies where.

    Raises:
        UserError: it does not fit, or does not compute in pieces.
    """
    parts = stacks_of(network)
    layers = [layer for stack in parts for layer in stack]
    sizes = [held_bytes(layer) for layer in layers]
    cards = cut(sizes, held_bytes(network) - sum(sizes), rooms)
    where = [devices[card] for card in cards]
    _move(network, {id(layer): device for layer, device in zip(layers, where, strict=True)}, devices[0])
    if not any(cards):
        return f"model.device_map=auto: the model fits one GPU, and lies on {devices[0]}"
    hook(parts, where, devices[0])
    _try(network)
    shares = ", ".join(f"{count} on {device}" for device, count in Counter(map(str, where)).items())
    return f"model.device_map=auto: {len(layers)} layers over several GPUs, {shares}; all else on {devices[0]}"


def stacks_of(network: nn.Module) -> list[list[nn.Module]]:
    """Return the layers of a network's body, in the order in which they compute: one stack, or an encoder's and a decoder's."""
    body = getattr(network, str(getattr(network, "base_model_prefix", "")), network)
    return [list(stack) for stack in _outermost(body)]


def _outermost(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost(child)


def held_bytes(module: nn.Module) -> int:
    """Return what a module holds between passes, in bytes: a quantised weight as it lies, and what goes with a weight that learns."""
    total = 0
    for p in module.parameters():
        # By shape: frozen factors that have not come yet take no memory.
        size = sum(t.numel() * t.element_size() for t in stored(p))
        total += TRAINED * size if p.requires_grad else size
    return total + sum(t.numel() * t.element_size() for t in module.buffers())


def _move(module: nn.Module, layers: Mapping[int, torch.device], device: torch.device) -> None:
    """Move a module to a device, and the layers in it to theirs."""
    device = layers.get(id(module), device)
    if all(id(inner) not in layers for inner in module.modules() if inner is not module):
        module.to(device)
        return
    module._apply(lambda t: t.to(device), recurse=False)  # type: ignore[no-untyped-call]
    for child in module.children():
        _move(child, layers, device)


def hook(stacks: Sequence[Sequence[nn.Module]], where: Sequence[torch.device], first: torch.device) -> None:
    """Let each layer bring what it is given to its device, and hand what it makes on to the next layer's, or back to the first.

    The latter so that a layer whose activations are computed anew is given them on its own device: torch then keeps the state of that
    device's generator, from which its dropout is drawn.
    """
    places = iter(where)
    for stack in stacks:
        own = [next(places) for _ in stack]
        for layer, device, after in zip(stack, own, [*own[1:], first], strict=True):
            layer.register_forward_pre_hook(partial(_brought, device), with_kwargs=True)
            layer.register_forward_hook(partial(_handed_on, after))


def _brought(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _on(args, device), _on(kwargs, device)


def _handed_on(device: torch.device, module: nn.Module, args: Any, output: Any) -> Any:
    # Hidden states come first; what else there is stays with the layer.
    return (_on(output[0], device), *output[1:]) if type(output) is tuple else _on(output, device)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        # A copy to the host that nobody waits for may be read before it is there.
        return value if value.device == device else value.to(device, non_blocking=device.type != "cpu")
    if type(value) in (tuple, list):
        return type(value)(_on(each, device) for each in value)
    # Nothing else is taken apart: a key-value cache has each layer's part where the layer is.
    return {key: _on(each, device) for key, each in value.items()} if type(value) is dict else value


@torch.no_grad()
def _try(network: nn.Module) -> None:
    try:
        try_body(network)
    except Exception as error:  # whatever a model's code does between its layers
        raise UserError(
            f"model.device_map=auto: {type(network).__name__} does not compute with its layers on several GPUs "
            f"({' '.join(str(error).split())[:120]}); leave it out, and use model.quantize=int4 where one GPU is too small"
        ) from None
