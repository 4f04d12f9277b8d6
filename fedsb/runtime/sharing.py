"""What processes of one machine hold once: networks and encoded arrays, in memory that all can map and none can write to.

A network goes in two parts, its structure, and its tensors as arrays.

Ray lays NumPy arrays into shared memory and hands out read-only views of them, but copies torch's tensors. Whoever rebuilds a network from
the parts must copy what it trains; the frozen rest is held once for all processes of a machine.

The last bits of a matrix product depend on how its operands lie to a cache line, and weights that were mapped from a file lie anyhow: every
tensor keeps its place, so that shared memory gives the bits that the file gives.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from typing import Any, NamedTuple

import numpy as np
import ray.util
import torch
from flwr.app import Array
from ray.cloudpickle import CloudPickler
from torch import Tensor, nn

from fedsb.core.state import LINE


class Parts(NamedTuple):
    """A network taken apart: the pickled structure, and the bytes of its distinct tensors."""

    structure: bytes
    memory: np.ndarray[Any, np.dtype[np.uint8]]


class _Tag(NamedTuple):
    """What stands for a tensor in the structure: where it begins in the memory, and what it is."""

    begin: int
    parameter: bool
    dtype: torch.dtype
    shape: tuple[int, ...]


def split(network: nn.Module) -> Parts:
    """Take a network apart; tensors that are one stay one."""
    sink = io.BytesIO()
    pickler = _Pickler(sink, protocol=pickle.HIGHEST_PROTOCOL)
    pickler.dump(network)
    return Parts(sink.getvalue(), pickler.memory())


def join(parts: Parts) -> nn.Module:
    """Put a network together around the memory, without copying it.

    A frozen tensor may lie in memory that is mapped read-only: writing to it ends the process.
    """
    network: nn.Module = _Unpickler(io.BytesIO(parts.structure), parts.memory).load()
    return network


def share_arrays() -> None:
    """Let what this process sends and receives through Ray keep the bytes of Flower's arrays beside the pickled rest, and map them.

    Ray must be running. An array that came in so holds a ``memoryview`` where it held ``bytes``.
    """
    ray.util.register_serializer(Array, serializer=_array_parts, deserializer=_array_of)


def _array_parts(array: Array) -> tuple[str, tuple[int, ...], str, np.ndarray[Any, np.dtype[np.uint8]]]:
    return array.dtype, array.shape, array.stype, np.frombuffer(array.data, np.uint8)


def _array_of(parts: tuple[str, tuple[int, ...], str, np.ndarray[Any, np.dtype[np.uint8]]]) -> Array:
    dtype, shape, stype, data = parts
    array = Array(dtype=dtype, shape=shape, stype=stype, data=b"")
    array.data = data.data  # type: ignore[assignment]
    return array


class _Pickler(CloudPickler):  # type: ignore[misc]
    def __init__(self, sink: io.BytesIO, protocol: int) -> None:
        super().__init__(sink, protocol=protocol)
        self._tags: dict[int, _Tag] = {}
        self._flats: list[tuple[int, Tensor]] = []
        self._end = 0

    def persistent_id(self, value: Any) -> _Tag | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._tags:
            flat = value.detach().cpu().contiguous().reshape(-1)
            begin = -(-self._end // LINE) * LINE + flat.data_ptr() % LINE
            self._tags[id(value)] = _Tag(begin, isinstance(value, nn.Parameter), value.dtype, tuple(value.shape))
            self._flats.append((begin, flat))
            self._end = begin + flat.nbytes
        return self._tags[id(value)]

    def memory(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        memory = torch.zeros(self._end, dtype=torch.uint8)
        for begin, flat in self._flats:
            memory[begin : begin + flat.nbytes] = flat.view(torch.uint8)
        return memory.numpy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, memory: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        super().__init__(source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._memory = torch.from_numpy(memory)
        self._made: dict[_Tag, Tensor] = {}

    def persistent_load(self, tag: _Tag) -> Tensor:
        if tag not in self._made:
            end = tag.begin + math.prod(tag.shape) * tag.dtype.itemsize
            tensor = self._memory[tag.begin : end].view(tag.dtype).reshape(tag.shape)
            self._made[tag] = nn.Parameter(tensor, requires_grad=False) if tag.parameter else tensor
        return self._made[tag]
