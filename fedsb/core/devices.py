"""Between the host and a GPU: batches without a wait, and states in one copy each way.

Whatever the host reads off a GPU makes it wait until the GPU has done all that it was asked for, and then the GPU waits for the next
command. On a CPU nothing here copies anything that would not be copied anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsb.core.state import Name, State


class Known(Tensor):
    """A tensor on a GPU whose values the host has as well: where code branches on them, it need not wait for the GPU.

    Models do so on what they read: whether anything is padded, whether rows are packed, whether padding goes without a mask.
    What is computed of it by :data:`FOLLOWED` is known in turn; all else gives a plain tensor.

    Attributes:
        host: the same values on the CPU.
    """

    host: Tensor

    @classmethod
    def of(cls, there: Tensor, host: Tensor) -> Known:
        """Return ``there`` with what the host knows of it."""
        known = there.as_subclass(cls)
        known.host = host
        return known

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if function in READ:
                return function(*_on_host(args))
            found = function(*args, **given)
            if function not in FOLLOWED or not all(isinstance(t, cls) for t in _tensors([*args, *given.values()])):
                return found
            twin = function(*_on_host(args), **dict(zip(given, _on_host(given.values()), strict=True)))
        return _paired(found, twin)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [t for value in values for t in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(t, Tensor)]


def _on_host(values: Iterable[Any]) -> list[Any]:
    """Return arguments with the host's values in the place of the GPU's, and the CPU for every device."""
    return [_host_of(value) for value in values]


def _host_of(value: Any) -> Any:
    if isinstance(value, Known):
        return value.host
    if isinstance(value, torch.device) or (isinstance(value, str) and value.startswith(("cuda", "meta"))):
        return torch.device("cpu")
    return [_host_of(v) for v in value] if isinstance(value, list) else value


def _paired(found: Any, twin: Any) -> Any:
    if isinstance(found, Tensor):
        return found if isinstance(found, Known) else Known.of(found, twin)
    return type(found)([_paired(f, t) for f, t in zip(found, twin, strict=True)]) if isinstance(found, (list, tuple)) else found


READ = frozenset({Tensor.__bool__, Tensor.__int__, Tensor.__contains__, Tensor.item, Tensor.tolist})
FOLLOWED: frozenset[Callable[..., Any]] = frozenset(
    {
        *(
            Tensor.to,
            Tensor.bool,
            Tensor.long,
            Tensor.int,
            Tensor.__getitem__,
            Tensor.view,
            Tensor.reshape,
            Tensor.expand,
            Tensor.unsqueeze,
            Tensor.split,
            torch.split,
        ),
        *(Tensor.all, Tensor.any, Tensor.sum, Tensor.max, Tensor.min, torch.all, torch.any, torch.sum, torch.max, torch.min),
        *(Tensor.__eq__, Tensor.__ne__, Tensor.eq, Tensor.ne, torch.eq, torch.ne, Tensor.__invert__, torch.logical_not),
        *(Tensor.sub, Tensor.__sub__, torch.diff, Tensor.diff, torch.cumsum, Tensor.cumsum),
    }
)


def placed(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Put a batch on a device; nobody waits for it, and the host knows it still: see :class:`Known`."""
    if device.type == "cpu":
        return dict(batch)
    return {key: Known.of(_sent(value, device), value) for key, value in batch.items()}


def plain(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch of which the host knows nothing."""
    return {key: value.as_subclass(Tensor) for key, value in batch.items()}


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    # Only out of pinned memory does a copy run beside the host; torch keeps that memory until the copy is over.
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def on_device(state: State, device: torch.device) -> State:
    """Return a state of float32 tensors on a device: in one copy, of which its tensors are views then; a CPU's is the state itself."""
    if device.type == "cpu" or not len(state) or all(t.device.type != "cpu" for t in state.values()):
        return state
    flat = _sent(torch.cat([t.detach().to("cpu", torch.float32).reshape(-1) for t in state.values()]), device)
    return _cut(flat, {name: tuple(t.shape) for name, t in state.items()})


def on_devices(state: State, where: Mapping[Name, torch.device]) -> State:
    """Return a state on several devices, named for each tensor: see :func:`on_device`, in one copy to each."""
    devices = dict.fromkeys(where[name] for name in state)
    if len(devices) < 2:
        return on_device(state, next(iter(devices), torch.device("cpu")))
    parts = (on_device(State({name: t for name, t in state.items() if where[name] == device}), device) for device in devices)
    return State({name: t for part in parts for name, t in part.items()})


def on_host(tensors: Mapping[Name, Tensor]) -> State:
    """Copy tensors to float32 on the CPU: in one copy from each other device on which some lie."""
    found: dict[Name, Tensor] = {}
    for device in dict.fromkeys(t.device for t in tensors.values()):
        found |= _from(device, {name: t.detach() for name, t in tensors.items() if t.device == device})
    return State(found)


def _from(device: torch.device, tensors: Mapping[Name, Tensor]) -> Mapping[Name, Tensor]:
    if device.type == "cpu":
        return {name: t.to("cpu", torch.float32, copy=True) for name, t in tensors.items()}
    flat = torch.cat([t.to(torch.float32).reshape(-1) for t in tensors.values()]).to("cpu")
    return _cut(flat, {name: tuple(t.shape) for name, t in tensors.items()})


def _cut(flat: Tensor, shapes: Mapping[Name, tuple[int, ...]]) -> State:
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    return State({name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)})
