"""A reply that is broken in any way is dropped and named, and its client counts again as soon as it answers well."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedsb.client_app import app as client_app
from fedsb.wire.messages import decode_instruction
from tests.strategies.federations import ClientCall, Federation, federate
from tests.strategies.rounds import Options

Tamper = Callable[[RecordDict], RecordDict]


def tampering(client: str, tampers: Sequence[Tamper]) -> ClientCall:
    """Return the ClientApp with the replies of one client changed on their way out, by one function a round."""

    def call(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        if message.metadata.message_type != "train":
            return reply
        instruction = decode_instruction(message.content)
        if instruction.client != client or instruction.round > len(tampers):
            return reply
        return Message(tampers[instruction.round - 1](reply.content), reply_to=message)

    return call


def with_arrays(content: RecordDict, change: Callable[[Any], Any], key: str = "trained") -> RecordDict:
    arrays = dict(content.array_records["arrays"])
    arrays[key] = Array(change(arrays[key].numpy().copy()))
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": content.metric_records["metrics"]})


def with_metrics(content: RecordDict, **changes: Any) -> RecordDict:
    metrics = MetricRecord({**content.metric_records["metrics"], **changes})
    return RecordDict({"arrays": content.array_records["arrays"], "metrics": metrics})


def poisoned(values: Any, with_what: float) -> Any:
    values[3] = with_what
    return values


def with_data(content: RecordDict, data: bytes) -> RecordDict:
    array = content.array_records["arrays"]["trained"]
    damaged = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)
    return RecordDict({**content, "arrays": ArrayRecord({**content.array_records["arrays"], "trained": damaged})})


def with_header(content: RecordDict, **header: Any) -> RecordDict:
    """Let an array's header lie as only Flower's inflatable objects can: they read it from JSON."""
    for name, value in header.items():
        setattr(content.array_records["arrays"]["trained"], name, value)
    return content


def archive() -> bytes:
    sink = io.BytesIO()
    np.savez(sink, np.zeros(3, np.float32))
    return sink.getvalue()


def npy_header(shape: tuple[int, ...]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return sink.getvalue()


def without(content: RecordDict, name: str) -> RecordDict:
    return RecordDict({key: record for key, record in content.items() if key != name})


def of_another_type(content: RecordDict) -> RecordDict:
    array = content.array_records["arrays"]["trained"]
    strange = Array(dtype="strange", shape=array.shape, stype=array.stype, data=array.data)
    return RecordDict({**content, "arrays": ArrayRecord({**content.array_records["arrays"], "trained": strange})})


def renamed(content: RecordDict, old: str, new: str) -> RecordDict:
    arrays = {new if key == old else key: array for key, array in content.array_records["arrays"].items()}
    return RecordDict({**content, "arrays": ArrayRecord(arrays)})


BROKEN: dict[str, tuple[Tamper, str]] = {
    "nan": (lambda c: with_arrays(c, lambda v: poisoned(v, float("nan"))), r"R of '.*encoder\.layer\.0.*' holds NaN or infinity"),
    "infinity": (lambda c: with_arrays(c, lambda v: poisoned(v, float("inf")), "head"), r"head of 'classifier\..*' holds NaN or infinity"),
    "too few values": (lambda c: with_arrays(c, lambda v: v[:-1]), r"group 'trained' holds \d+ values, expected \d+"),
    "another layout": (
        lambda c: with_metrics(c, layout=12345),
        r"layout 000000003039 .* shapes than R of 'bert.* to .*; model",
    ),
    "no arrays": (lambda c: without(c, "arrays"), r"groups are \[\], expected \['head', 'trained'\]"),
    "no metrics": (lambda c: without(c, "metrics"), r"a reply needs a MetricRecord 'metrics' with 'num-examples'; it holds \['arrays'\]"),
    "metrics of another kind": (lambda c: RecordDict({**c, "metrics": ConfigRecord({"num-examples": 3})}), "a reply needs a MetricRecord"),
    "no examples": (lambda c: with_metrics(c, **{"num-examples": 0}), "num-examples is 0, expected at least 1"),
    "negative examples": (lambda c: with_metrics(c, **{"num-examples": -3}), "num-examples is -3, expected at least 1"),
    "a list of examples": (lambda c: with_metrics(c, **{"num-examples": [1, 2]}), "num-examples"),
    "nan examples": (lambda c: with_metrics(c, **{"num-examples": float("nan")}), "num-examples"),
    "infinite examples": (lambda c: with_metrics(c, **{"num-examples": float("inf")}), "num-examples"),
    "a nan loss": (lambda c: with_metrics(c, loss=float("nan")), "loss is nan"),
    "a nan of the wire": (lambda c: with_metrics(c, **{"encoding-error": float("nan")}), "encoding-error is nan"),
    "a list of losses": (lambda c: with_metrics(c, loss=[0.1, 0.2]), "loss"),
    "a group renamed": (lambda c: renamed(c, "head", "tail"), r"groups are \['tail', 'trained'\], expected \['head', 'trained'\]"),
    "an unknown dtype of the wire": (
        lambda c: renamed(c, "head", "head:int3"),
        r"array 'head:int3' .* not of a wire dtype \(float32, bfloat16, int8\)",
    ),
    "an unknown dtype of the array": (of_another_type, r"array 'trained' \(strange \[\d+\]\) is not of a wire dtype"),
    "a row": (lambda c: with_arrays(c, lambda v: v[None]), r"array 'trained' \(float32 \[1, \d+\]\) is not of a wire dtype .*, flat"),
    "a table": (lambda c: with_arrays(c, lambda v: v.reshape(2, -1)), r"array 'trained' \(float32 \[2, \d+\]\) is not .*, flat"),
    "an archive": (lambda c: with_data(c, archive()), "group 'trained' cannot be read: it is an archive"),
    "a broken archive": (lambda c: with_data(c, b"PK\x03\x04 and no more"), "group 'trained' cannot be read"),
    "a header beyond all memory": (lambda c: with_data(c, npy_header((10**15,))), "group 'trained' cannot be read"),
    "nothing behind the header": (lambda c: with_data(c, npy_header((8,))), "group 'trained' cannot be read"),
    "a shape beyond protobuf": (lambda c: with_header(c, shape=(2**31,)), r"array 'trained' \(float32 \[2147483648\]\) is not"),
    "a negative shape": (lambda c: with_header(c, shape=(-3,)), r"array 'trained' \(float32 \[-3\]\) is not"),
    "a nested shape": (lambda c: with_header(c, shape=([3],)), "group 'trained' cannot be read"),
    "no shape": (lambda c: with_header(c, shape=None), "group 'trained' cannot be read"),
    "a shape that is a number": (lambda c: with_header(c, shape=3), "group 'trained' cannot be read"),
    "a dtype that is a list": (lambda c: with_header(c, dtype=["float32"]), "group 'trained' cannot be read"),
    "a dtype that is a number": (lambda c: with_header(c, dtype=3), "group 'trained' cannot be read|is not of a wire dtype"),
    "a format that is a list": (lambda c: with_header(c, stype=["numpy.ndarray"]), "group 'trained' cannot be read"),
    "doubles": (lambda c: with_arrays(c, lambda v: v.astype("float64")), r"array 'trained' \(float64 .* not of a wire dtype"),
}


@pytest.fixture(scope="module")
def battered(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation in which client-1 sends a broken reply of the next kind each round, and a good one at last."""
    rounds = len(BROKEN) + 1
    more = ["federation.fraction=1.0", f"federation.num_rounds={rounds}", "train.local_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("home")))
        return federate(options("tiny_bert", "fed_sb", *more), app=tampering("client-1", [tamper for tamper, _ in BROKEN.values()]))


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reply_is_dropped_and_named(battered: Federation, case: str) -> None:
    record = battered.records[list(BROKEN).index(case) + 1]
    assert set(record.failed) == {"client-1"}
    assert re.search(BROKEN[case][1], record.failed["client-1"])
    assert set(record.clients) == {"client-0", "client-2", "client-3", "client-4"}


def test_a_client_whose_replies_were_broken_counts_again_when_they_are_not(battered: Federation) -> None:
    assert not battered.records[-1].failed
    assert len(battered.records[-1].clients) == 5
