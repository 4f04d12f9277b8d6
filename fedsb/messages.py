"""The codec between states and Flower records: the wire contract lives here and nowhere else.

Instructions carry one ``ArrayRecord`` (``arrays``) and one ``ConfigRecord`` (``config``); replies one ``ArrayRecord`` and one
``MetricRecord`` (``metrics``) with the same keys from every client. Inside, each group of a state (``trained``, ``head``) is one
flat array, modules concatenated in sorted order, and the frozen bundle is one more (``frozen``). float32, or bfloat16 as an
int16 view whose key says so (``trained:bfloat16``). The layout travels as a 48-bit digest.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsb.frozen import ROOT, Bundle
from fedsb.state import Layout, Name, State, pack, unpack

FROZEN = "frozen"
NPY = "numpy.ndarray"  # how Flower names the format of its arrays
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# As NumPy holds them, which knows no bfloat16.
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(np.int16)}


class LayoutError(ValueError):
    """A message does not fit the layout that the receiver expects."""


@dataclass(frozen=True)
class Instruction:
    """What the server asks of one logical client.

    Attributes:
        client: name of the logical client.
        round: server round, 0 during the start.
        stage: what to do inside the message type (the exchange of a start); empty for plain rounds.
        frozen: head of the frozen log that the work is based on.
        labels: names of the classes, in order.
        flats: the packed state as received, by group.
        digest: digest of the state's layout on the sender's side.
        bundle: frozen deltas that the client is thought to lack.
    """

    client: str
    round: int
    stage: str = ""
    frozen: str = ROOT
    labels: tuple[str, ...] = ()
    flats: Mapping[str, Tensor] = field(default_factory=dict)
    digest: int = 0
    bundle: Bundle | None = None

    def state(self, layout: Layout) -> State:
        """Unpack the state.

        Raises:
            LayoutError: the sender's layout is another one.
        """
        return _unpack(self.flats, self.digest, layout)


@dataclass(frozen=True)
class Reply:
    """What a client answers: a packed state, the number of its examples, and metrics.

    ``missing`` where it lacks frozen state; ``code`` above 0 where a private client says by a number why it does not answer.
    """

    flats: Mapping[str, Tensor]
    digest: int
    num_examples: int
    metrics: Mapping[str, float]
    missing: bool = False
    code: int = 0

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return all(bool(torch.isfinite(flat).all()) for flat in self.flats.values())

    def state(self, layout: Layout) -> State:
        """Unpack the state.

        Raises:
            LayoutError: the client's layout is another one.
        """
        return _unpack(self.flats, self.digest, layout)


def _unpack(flats: Mapping[str, Tensor], digest: int, layout: Layout) -> State:
    try:
        state = unpack(flats, layout)
    except ValueError as error:
        raise LayoutError(str(error)) from None
    if digest != layout.digest:
        first = layout.shapes[0][0] if layout.shapes else Name("", "")
        raise LayoutError(
            f"layout {digest:012x} has as many values as the expected {layout.digest:012x}, but other names or shapes, "
            f"from '{first.module}' ({first.role}) on"
        )
    return state


def encode_arrays(state: State, dtype: str = "float32") -> ArrayRecord:
    """Pack a state into an ``ArrayRecord``, one flat array a group."""
    arrays = {}
    for group, flat in pack(state.map(lambda t: t.detach().to("cpu"))).items():
        arrays.update(_encode_flat(group, flat, dtype))
    return ArrayRecord(arrays)


def decode_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the flat float32 tensors of an ``ArrayRecord`` by group.

    Raises:
        LayoutError: an array that is not of a wire dtype, or that cannot be read.
    """
    return dict(_decode_flat(key, array) for key, array in record.items())


def _encode_flat(group: str, flat: Tensor, dtype: str) -> dict[str, Array]:
    if dtype == "float32":
        return {group: Array(flat.to(torch.float32).numpy())}
    return {f"{group}:{dtype}": Array(flat.to(DTYPES[dtype]).view(torch.int16).numpy())}


def _decode_flat(key: str, array: Array) -> tuple[str, Tensor]:
    group, _, dtype = key.partition(":")
    try:
        values = _values(array)
    except Exception as error:  # a damaged file makes NumPy's reader raise nearly anything, out of memory and bad archives included
        raise LayoutError(f"the array of group '{group}' cannot be read: {error}") from None
    stored = STORED.get(dtype or "float32")
    if stored is None or (array.dtype, tuple(array.shape)) != (stored.name, values.shape) or values.dtype != stored or values.ndim != 1:
        raise LayoutError(
            f"array '{key}' ({array.dtype} {list(array.shape)}) is not of a wire dtype ({', '.join(STORED)}), flat, and of its own shape"
        )
    if key == FROZEN:
        return group, _borrowed(values)
    # Torch's own memory begins on a cache line, NumPy's anywhere, and the last bits of a product with it depend on that.
    flat = torch.tensor(values)
    return group, flat.view(DTYPES[dtype]).to(torch.float32) if dtype else flat


def _values(array: Array) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array's values, where it can be without the two copies that NumPy's reader makes of them.

    Raises:
        TypeError: the data hold no single array.
    """
    start = _npy_header(array.dtype, tuple(array.shape)) if array.stype == NPY else None
    if start and bytes(array.data[: len(start)]) == start:
        return np.frombuffer(array.data, array.dtype, offset=len(start)).reshape(array.shape)
    values: object = array.numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError("it is an archive")
    return values


@lru_cache(maxsize=64)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes | None:
    """Return how the .npy file of a wire array begins; None for another dtype."""
    if dtype not in {stored.name for stored in STORED.values()}:
        return None
    sink = BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    return sink.getvalue()


def _borrowed(values: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
    """Return a tensor over the memory of an array, which may be read-only: what is frozen is only read, and written to the cache."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def quantise(state: State, dtype: str) -> State:
    """Return a state as the other side decodes it, in float32."""
    return state.map(lambda t: t.to(DTYPES[dtype]).to(torch.float32))


@dataclass(frozen=True)
class Cargo:
    """The encoded part of an instruction that messages to many clients share: a state, and the frozen deltas that they lack.

    Attributes:
        arrays: both, as they travel.
        config: how to read the deltas; empty where there are none.
    """

    arrays: ArrayRecord
    config: Mapping[str, str] = field(default_factory=dict)


def encode_cargo(arrays: ArrayRecord, bundle: Bundle | None) -> Cargo:
    """Add a frozen bundle to the encoded state ``arrays``."""
    if bundle is None:
        return Cargo(arrays)
    layout = json.dumps(Layout.of(bundle.state).shapes, separators=(",", ":"))
    flat = torch.cat([t.reshape(-1) for t in bundle.state.values()])
    return Cargo(ArrayRecord({**arrays, **_encode_flat(FROZEN, flat, "float32")}), {"parent": bundle.parent, "bundle": layout})


def encode_instruction(instruction: Instruction, cargo: Cargo) -> RecordDict:
    """Build the content of an instruction; its ``flats`` and ``bundle`` are those of the cargo."""
    config: dict[str, str | int] = {
        "client": instruction.client,
        "round": instruction.round,
        "stage": instruction.stage,
        "frozen": instruction.frozen,
        "labels": json.dumps(instruction.labels),
        "layout": instruction.digest,
        **cargo.config,
    }
    return RecordDict({"arrays": cargo.arrays, "config": ConfigRecord(config)})  # type: ignore[arg-type]


def decode_instruction(content: RecordDict) -> Instruction:
    """Read an instruction."""
    config = content.config_records["config"]
    flats = decode_arrays(content.array_records["arrays"])
    frozen_flat = flats.pop(FROZEN, None)
    head = str(config["frozen"])
    return Instruction(
        client=str(config["client"]),
        round=int(config["round"]),  # type: ignore[arg-type]
        stage=str(config["stage"]),
        frozen=head,
        labels=tuple(json.loads(str(config["labels"]))),
        flats=flats,
        digest=int(config["layout"]),  # type: ignore[arg-type]
        bundle=None if frozen_flat is None else Bundle(str(config["parent"]), head, _bundle_state(str(config["bundle"]), frozen_flat)),
    )


def _bundle_state(layout: str, flat: Tensor) -> State:
    shapes = [(Name(*name), tuple(shape)) for name, shape in json.loads(layout)]
    parts = torch.split(flat, [math.prod(shape) for _, shape in shapes])
    return State({name: part.view(shape) for (name, shape), part in zip(shapes, parts, strict=True)})


def encode_reply(state: State, num_examples: int, metrics: Mapping[str, float], dtype: str = "float32") -> RecordDict:
    """Build a reply with an upload."""
    record = MetricRecord({"num-examples": num_examples, "layout": Layout.of(state).digest, **metrics})
    return RecordDict({"arrays": encode_arrays(state, dtype), "metrics": record})


def encode_missing() -> RecordDict:
    """Build the reply of a client that lacks frozen state: the server sends it and asks again."""
    return RecordDict({"metrics": MetricRecord({"missing": 1})})


def encode_code(number: int) -> RecordDict:
    """Build the reply of a private client that does not answer; see :mod:`fedsb.privacy.codes`."""
    return RecordDict({"metrics": MetricRecord({"code": number})})


def decode_reply(content: RecordDict) -> Reply:
    """Read a reply.

    Raises:
        LayoutError: a record or the example count is not there, or cannot be read.
    """
    if "metrics" not in content.metric_records or not {"missing", "code", "num-examples"} & set(content["metrics"]):
        raise LayoutError(f"a reply needs a MetricRecord 'metrics' with 'num-examples'; it holds {sorted(content)}")
    metrics = dict(content.metric_records["metrics"])
    if metrics.pop("missing", 0):
        return Reply({}, 0, 0, {}, missing=True)
    if code := _whole("code", metrics.pop("code", 0)):
        return Reply({}, 0, 0, {}, code=code)
    flats = decode_arrays(content.array_records["arrays"]) if "arrays" in content.array_records else {}
    num_examples, digest = (_whole(key, metrics.pop(key, 0)) for key in ("num-examples", "layout"))
    return Reply(flats, digest, num_examples, {key: _real(key, value) for key, value in metrics.items()})


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int):
        raise LayoutError(f"metric '{key}' is {value}, expected a whole number")
    return value


def _real(key: str, value: object) -> float:
    if not isinstance(value, (int, float)):
        raise LayoutError(f"metric '{key}' is {value}, expected a number")
    return float(value)
