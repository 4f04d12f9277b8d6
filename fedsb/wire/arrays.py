"""Arrays on the wire: each group of a state as one flat array, float32, or one of another type whose key says so.

bfloat16 goes as an int16 view; int8 as :mod:`fedsb.wire.blocks8` encodes it, which takes the layout to decode. The groups of a secure sum
(:mod:`fedsb.wire.secured`) hold whole numbers, whatever the type of the wire.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedsb.core.state import MASKED, SEALED, Layout, Packed, State, pack, unpack
from fedsb.wire.blocks8 import coded_bytes, decode_blocks, encode_blocks

FROZEN = "frozen"
NPY = "numpy.ndarray"  # how Flower names the format of its arrays
INT8 = "int8"
# As NumPy holds them, which knows no bfloat16.
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.int16), INT8: np.dtype(np.int8)}


# Groups that have a type of their own, and as what torch holds it, which computes with few kinds of whole numbers.
WHOLE: dict[str, tuple[np.dtype[Any], np.dtype[Any]]] = {
    MASKED: (np.dtype(np.uint32), np.dtype(np.int32)),
    SEALED: (np.dtype(np.uint8), np.dtype(np.uint8)),
}


class LayoutError(ValueError):
    """A message does not fit the layout that the receiver expects."""


class LayoutDiffers(LayoutError):
    """A whole state came, of another layout than the receiver's: the two sides have other models, adapters or ranks."""


def encode_arrays(state: State, dtype: str = "float32") -> ArrayRecord:
    """Pack a state into an ``ArrayRecord``, one flat array a group."""
    arrays, sizes = {}, tensor_sizes(Layout.of(state))
    for group, flat in pack(state.map(lambda t: t.detach().to("cpu"))).items():
        arrays.update(encode_flat(group, flat, dtype, sizes[group]))
    return ArrayRecord(arrays)


def tensor_sizes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return the number of values of each tensor, in the order in which they are packed, by group."""
    return {group: tuple(math.prod(shape) for _, shape in entries) for group, entries in layout.groups.items()}


def layout_bytes(layout: Layout, dtype: str = "float32") -> int:
    """Return the bytes of a state of some layout, as it travels."""
    sizes = tensor_sizes(layout)
    whole = sum(sum(sizes.pop(group)) * stored.itemsize for group, (stored, _) in WHOLE.items() if group in sizes)
    if dtype == INT8:
        return whole + sum(coded_bytes(of_group) for of_group in sizes.values())
    return whole + sum(map(sum, sizes.values())) * STORED[dtype].itemsize


def decode_state(record: ArrayRecord, layout: Layout) -> Packed:
    """Return the state of some layout that an ``ArrayRecord`` holds.

    Raises:
        LayoutError: it cannot be read.
        ValueError: its groups or their sizes are others.
    """
    return unpack_coded(decode_arrays(record), layout)


def unpack_coded(flats: Mapping[str, Tensor], layout: Layout) -> Packed:
    """Return the state of some layout from what :func:`decode_arrays` has read.

    Raises:
        ValueError: a group is missing or superfluous, or its size does not fit the layout.
    """
    sizes = tensor_sizes(layout)
    return unpack({group: _decoded(group, flat, sizes.get(group)) for group, flat in flats.items()}, layout)


def _decoded(group: str, flat: Tensor, sizes: Sequence[int] | None) -> Tensor:
    if flat.dtype != torch.int8 or sizes is None:
        return flat
    try:
        return decode_blocks(flat, sizes)
    except ValueError as error:
        raise ValueError(f"group '{group}' holds {error}") from None


def decode_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the flat tensors of an ``ArrayRecord`` by group, in float32, or still in int8.

    That of ``frozen`` borrows its memory, which may be read-only.

    Raises:
        LayoutError: an array that is not of a wire dtype, or that cannot be read.
    """
    return dict(_decode_flat(key, array) for key, array in record.items())


def digest_of(said: Sequence[object], flats: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of what a message says, in JSON's own types, and of its packed state as received, by group."""
    digest = hashlib.sha256(json.dumps(said).encode())
    for group in sorted(flats):
        digest.update(f"{group}:{flats[group].dtype}:{flats[group].numel()}:".encode())
        digest.update(flats[group].numpy().tobytes())
    return digest.digest()


def encode_flat(group: str, flat: Tensor, dtype: str, sizes: Sequence[int]) -> dict[str, Array]:
    """Encode one flat tensor of others with so many values each, under the key that says its group and its type on the wire."""
    if group in WHOLE:
        return {f"{group}:{WHOLE[group][0].name}": _encoded(flat.numpy().view(WHOLE[group][0]))}
    if dtype == "float32":
        return {group: _encoded(flat.to(torch.float32).numpy())}
    coded = encode_blocks(flat.to(torch.float32), sizes) if dtype == INT8 else flat.to(torch.bfloat16).view(torch.int16)
    return {f"{group}:{dtype}": _encoded(coded.numpy())}


def encode_pieces(group: str, tensors: Sequence[Tensor]) -> dict[str, Array]:
    """Encode tensors in float32 as the one flat array that they are one after the other, with no copy of it but the encoded one."""
    pieces = [t.detach().to("cpu", torch.float32).contiguous().view(-1).numpy().astype("<f4", copy=False) for t in tensors]
    shape = (sum(len(piece) for piece in pieces),)
    data = b"".join((_npy_header("float32", shape), *(piece.data for piece in pieces)))
    return {group: Array(dtype="float32", shape=shape, stype=NPY, data=data)}


def _encoded(values: np.ndarray[Any, np.dtype[Any]]) -> Array:
    """Return the array that Flower would make of flat values, whose bytes it copies three times."""
    stored = values.dtype.newbyteorder("<")
    data = b"".join((_npy_header(stored.name, values.shape), values.astype(stored, copy=False).data))
    return Array(dtype=stored.name, shape=values.shape, stype=NPY, data=data)


def _decode_flat(key: str, array: Array) -> tuple[str, Tensor]:
    group, _, dtype = key.partition(":")
    try:
        values = _values(array)
    except Exception as error:  # a damaged file makes NumPy's reader raise nearly anything, out of memory and bad archives included
        raise LayoutError(f"the array of group '{_told(group)}' cannot be read: {_told(error)}") from None
    stored = _stored(group, dtype)
    if stored is None or (array.dtype, tuple(array.shape)) != (stored.name, values.shape) or values.dtype != stored or values.ndim != 1:
        raise LayoutError(
            f"array '{_told(key)}' ({_told(array.dtype)} {_told(list(array.shape))}) is not of a wire dtype ({', '.join(STORED)}), "
            "flat, and of its own shape"
        )
    if group in WHOLE:
        return group, torch.tensor(values.view(WHOLE[group][1]))
    if key == FROZEN:
        return group, _borrowed(values)
    # Torch's own memory begins on a cache line, NumPy's anywhere, and the last bits of a product with it depend on that.
    flat = torch.tensor(values)
    return group, flat.view(torch.bfloat16).to(torch.float32) if dtype == "bfloat16" else flat


def _stored(group: str, dtype: str) -> np.dtype[Any] | None:
    """Return as what NumPy holds an array of a group whose key says ``dtype``; None where there is no such type, or not of that group."""
    if group in WHOLE:
        return WHOLE[group][0] if dtype == WHOLE[group][0].name else None
    return STORED.get(dtype or "float32")


def _told(what: object) -> str:
    """Return what a sender has written, as far as it is fit for a log."""
    return " ".join(ascii(str(what))[1:-1].split())[:200]


def _values(array: Array) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array's values, where it can be without the two copies that NumPy's reader makes of them.

    Raises:
        TypeError: the data hold no single array.
    """
    start = _npy_header(array.dtype, tuple(array.shape)) if array.stype == NPY else b""
    if start and bytes(array.data[: len(start)]) == start:
        return np.frombuffer(array.data, np.dtype(array.dtype).newbyteorder("<"), offset=len(start)).reshape(array.shape)
    values: object = array.numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError("it is an archive")
    return values


@lru_cache(maxsize=64, typed=True)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return how the .npy file of a wire array begins; nothing for another dtype."""
    if dtype not in {stored.name for stored in (*STORED.values(), *(stored for stored, _ in WHOLE.values()))} or any(
        type(n) is not int for n in shape
    ):
        return b""
    sink = BytesIO()
    order = np.dtype(dtype).newbyteorder("<").str
    np.lib.format.write_array_header_1_0(sink, {"descr": order, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def _borrowed(values: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
    """Return a tensor over the memory of an array, which may be read-only: what is frozen is only read, and written to the cache."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def quantise(state: State, dtype: str) -> State:
    """Return a state as the other side decodes it, in float32."""
    return state.map(ROUNDED[dtype])


def _in_blocks(tensor: Tensor) -> Tensor:
    sizes = (tensor.numel(),)
    return decode_blocks(encode_blocks(tensor.detach().to("cpu", torch.float32).reshape(-1), sizes), sizes).view(tensor.shape)


# What a tensor is on the other side.
ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda t: t.to(torch.float32),
    "bfloat16": lambda t: t.to(torch.bfloat16).to(torch.float32),
    INT8: _in_blocks,
}
