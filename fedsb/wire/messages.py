"""The codec between instructions, replies and Flower records: the wire contract lives here, and in :mod:`fedsb.wire.arrays`.

Instructions carry one ``ArrayRecord`` (``arrays``) and one ``ConfigRecord`` (``config``); replies one ``ArrayRecord`` and one
``MetricRecord`` (``metrics``) with the same keys from every client. Inside, each group of a state (``trained``, ``head``) is one
flat array, modules concatenated in sorted order, and the frozen bundle is one more (``frozen``), in float32 always. A state is float32,
or of a type that its key says (``trained:bfloat16``, ``trained:int8``). The layout travels as a 48-bit digest.
What belongs to a secure sum stands in groups of its own, of whole numbers (:mod:`fedsb.wire.secured`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsb.core.state import SEALED, Layout, Name, State
from fedsb.wire.arrays import FROZEN, LayoutDiffers, LayoutError, decode_arrays, digest_of, encode_arrays, encode_pieces, unpack_coded
from fedsb.wire.frozen import ROOT, FrozenBundle
from fedsb.wire.secured import Secured, read_secured, told_of

ALIKE = "model, adapter.targets and rank must be the same on both sides"


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
        origin: names the run, from its first process on to every one that resumes it.
        own: the last round whose training by this client has counted, for a client that keeps something of its own: it goes on from what it
            kept then, and from the start at 0. No message of another run has it.
        carried: roles of which a client adds what the wire's rounding left out of its last upload that counted to this one; in such a
            run ``own`` tells which that was. None where nothing is carried.
        rank: that the client goes on with, where it has become less than its own; None: its own.
        ranks: of the leading components that were sent, by module in sorted order; none where all of them were.
        made_in: the round behind which the state was made, by which the others are drawn.
        secured: of the secure sum that the message belongs to.
        start: the server's :func:`~fedsb.core.prints.prints` of the factors that everybody makes; empty where the method has none.
        overrides: of a resumed run, for a real node, which does not see its folder; read by :func:`fedsb.app.asked.as_told`.
    """

    client: str
    round: int
    stage: str = ""
    frozen: str = ROOT
    labels: tuple[str, ...] = ()
    flats: Mapping[str, Tensor] = field(default_factory=dict)
    digest: int = 0
    bundle: FrozenBundle | None = None
    overrides: str | None = None
    origin: str = ""
    own: int = 0
    carried: tuple[str, ...] = ()
    start: tuple[float, ...] = ()
    rank: int | None = None
    ranks: tuple[int, ...] = ()
    made_in: int = 0
    secured: Secured | None = None

    @property
    def asked(self) -> str:
        """A digest of what a reply follows from, but for the run's configuration, its classes, and what the client keeps itself.

        It is the same where a run asks again that was ended: under another number of an exchange, say, or to a client that lacks more.
        """
        said = (self.client, self.round, self.stage, self.frozen, self.digest, self.own, self.carried, self.rank, self.ranks, self.made_in)
        return digest_of(said, self.flats).hex()

    def state(self, layout: Layout) -> State:
        """Unpack the state.

        Raises:
            LayoutError: the sender's layout is another one.
        """
        return _unpack(self.flats, self.digest, layout)


@dataclass(frozen=True)
class Reply:
    """What a client answers: a packed state, the number of its examples, and metrics.

    ``missing`` where it lacks frozen state; ``code`` above 0 where a client says by a number why it does not answer, perhaps with the
    ``key`` of the configuration at fault.
    """

    flats: Mapping[str, Tensor]
    digest: int
    num_examples: int
    metrics: Mapping[str, float]
    missing: bool = False
    code: int = 0
    key: str = ""

    @property
    def finite(self) -> bool:
        """Whether no value is NaN or infinite; False where int8 values must be decoded to tell."""
        # A sum is finite only where every value is; one that overflows says nothing yet.
        return all(
            flat.dtype != torch.int8 and (bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all()))
            for flat in self.flats.values()
        )

    def state(self, layout: Layout) -> State:
        """Unpack the state.

        Raises:
            LayoutError: the client's layout is another one.
        """
        return _unpack(self.flats, self.digest, layout)


def _unpack(flats: Mapping[str, Tensor], digest: int, layout: Layout) -> State:
    try:
        state = unpack_coded(flats, layout)
    except ValueError as error:
        raise LayoutDiffers(f"{error}, of {_ends(layout)}; {ALIKE}") from None
    if digest != layout.digest:
        raise LayoutDiffers(
            f"layout {digest:012x} has as many values as the expected {layout.digest:012x}, but other names or shapes "
            f"than {_ends(layout)}; {ALIKE}"
        )
    return state


def _ends(layout: Layout) -> str:
    """Name the first and the last entry: a digest does not tell where another layout differs."""
    shown = [f"{name.role} of '{name.module}' {list(shape)}" for name, shape in (*layout.shapes[:1], *layout.shapes[-1:])]
    return " to ".join(shown) or "none"


@dataclass(frozen=True)
class SharedPart:
    """The encoded part of an instruction that messages to many clients share: a state, and the frozen deltas that they lack.

    Attributes:
        arrays: both, as they travel.
        config: how to read the deltas; empty where there are none.
    """

    arrays: ArrayRecord
    config: Mapping[str, str] = field(default_factory=dict)


def encode_shared(arrays: ArrayRecord, bundle: FrozenBundle | None) -> SharedPart:
    """Add a frozen bundle to the encoded state ``arrays``."""
    if bundle is None:
        return SharedPart(arrays)
    layout = json.dumps(Layout.of(bundle.state).shapes, separators=(",", ":"))
    frozen = encode_pieces(FROZEN, list(bundle.state.values()))
    return SharedPart(ArrayRecord({**arrays, **frozen}), {"parent": bundle.parent, "bundle": layout})


def encode_instruction(instruction: Instruction, shared: SharedPart) -> RecordDict:
    """Build the content of an instruction; its ``flats`` and ``bundle`` are those of the shared part."""
    config: dict[str, str | int | float | list[int] | list[float] | list[str]] = {
        "client": instruction.client,
        "round": instruction.round,
        "stage": instruction.stage,
        "frozen": instruction.frozen,
        "labels": json.dumps(instruction.labels),
        "layout": instruction.digest,
        "origin": instruction.origin,
        **shared.config,
        **({"own": instruction.own} if instruction.own else {}),
        **({"carried": list(instruction.carried)} if instruction.carried else {}),
        **({"start": list(instruction.start)} if instruction.start else {}),
        **({} if instruction.rank is None else {"rank": instruction.rank}),
        **({"ranks": list(instruction.ranks), "made_in": instruction.made_in} if instruction.ranks else {}),
        **({} if instruction.overrides is None else {"overrides": instruction.overrides}),
        **told_of(instruction.secured),
    }
    return RecordDict({"arrays": shared.arrays, "config": ConfigRecord(config)})  # type: ignore[arg-type]


def decode_instruction(content: RecordDict) -> Instruction:
    """Read an instruction."""
    config = content.config_records["config"]
    flats = decode_arrays(content.array_records["arrays"])
    frozen_flat, sealed = flats.pop(FROZEN, None), flats.pop(SEALED, None)
    head = str(config["frozen"])
    return Instruction(
        client=str(config["client"]),
        round=int(config["round"]),  # type: ignore[arg-type]
        stage=str(config["stage"]),
        frozen=head,
        origin=_folder_name(str(config.get("origin", ""))),
        own=int(config.get("own", 0)),  # type: ignore[arg-type]
        carried=tuple(map(str, config.get("carried", ()))),  # type: ignore[arg-type]
        start=tuple(config.get("start", ())),  # type: ignore[arg-type]
        rank=int(config["rank"]) if "rank" in config else None,  # type: ignore[arg-type]
        ranks=tuple(config.get("ranks", ())),  # type: ignore[arg-type]
        made_in=int(config.get("made_in", 0)),  # type: ignore[arg-type]
        secured=read_secured(config, sealed),
        labels=tuple(json.loads(str(config["labels"]))),
        flats=flats,
        digest=int(config["layout"]),  # type: ignore[arg-type]
        bundle=None if frozen_flat is None else _bundle(config, head, frozen_flat),
    )


def _bundle(config: ConfigRecord, head: str, flat: Tensor) -> FrozenBundle:
    return FrozenBundle(str(config["parent"]), head, _bundle_state(str(config["bundle"]), flat))


def _folder_name(origin: str) -> str:
    """Take what comes from the server as the name of a folder, or not at all."""
    return origin if re.fullmatch(r"[0-9a-f]{0,32}", origin) else ""


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


def encode_code(number: int, key: str | None = None) -> RecordDict:
    """Build the reply of a client that says by a code why it does not answer; see :mod:`fedsb.privacy.codes`."""
    content = RecordDict({"metrics": MetricRecord({"code": number})})
    if key is not None:
        content["config"] = ConfigRecord({"key": key})
    return content


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
        return Reply({}, 0, 0, {}, code=code, key=_key_in(content))
    flats = decode_arrays(content.array_records["arrays"]) if "arrays" in content.array_records else {}
    num_examples, digest = (_whole(key, metrics.pop(key, 0)) for key in ("num-examples", "layout"))
    return Reply(flats, digest, num_examples, {key: _real(key, value) for key, value in metrics.items()})


def _key_in(content: RecordDict) -> str:
    return str(content.config_records["config"].get("key", "")) if "config" in content.config_records else ""


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int):
        raise LayoutError(f"metric '{key}' is {value}, expected a whole number")
    return value


def _real(key: str, value: object) -> float:
    if not isinstance(value, (int, float)):
        raise LayoutError(f"metric '{key}' is {value}, expected a number")
    return float(value)
