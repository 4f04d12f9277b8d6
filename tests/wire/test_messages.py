"""The wire: what goes in comes out, a misfit is named, and bytes are what protobuf and Flower's objects say."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State
from fedsb.wire.arrays import LayoutError, _encoded, decode_arrays, encode_arrays, layout_bytes, quantise
from fedsb.wire.byte_counts import overhead_bytes, payload_bytes
from fedsb.wire.frozen import ROOT, FrozenLog
from fedsb.wire.messages import (
    Instruction,
    Reply,
    decode_instruction,
    decode_reply,
    encode_instruction,
    encode_missing,
    encode_reply,
    encode_shared,
)

law = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from(["float32", "bfloat16", "int8"])
sizes = st.integers(1, 6)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def cores(modules: int, rank: int) -> State:
    """Return R of so many modules, named as in a BERT of six layers."""
    kinds = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    found = [f"encoder.layer.{i // len(kinds)}.{kinds[i % len(kinds)]}" for i in range(modules)]
    return State({Name(module, "R"): gaussian(rank, rank, seed=i) for i, module in enumerate(found)})


def mixed(a: int, b: int) -> State:
    return State({Name("x", "A"): gaussian(a, b), Name("x", "B"): gaussian(b, a, seed=1), Name("c.weight", HEAD): gaussian(a, seed=2)})


@law
@given(sizes, sizes, dtypes)
def test_a_reply_comes_back_as_it_was_rounded(a: int, b: int, dtype: str) -> None:
    state = mixed(a, b)
    reply = decode_reply(encode_reply(state, 17, {"loss": 0.5, "steps": 3}, dtype))
    assert (reply.num_examples, dict(reply.metrics), reply.missing) == (17, {"loss": 0.5, "steps": 3.0}, False)
    again, rounded = reply.state(Layout.of(state)), quantise(state, dtype)
    assert again.keys() == state.keys()
    assert all(t.dtype == torch.float32 and torch.equal(t, rounded[name]) for name, t in again.items())


def test_bfloat16_goes_as_the_upper_half_of_a_float32() -> None:
    """1.0 is 0x3F800000, -2.5 is 0xC0200000 and 2^-130, below float16's and above bfloat16's least number, 0x00080000."""
    values = torch.tensor([1.0, -2.5, 2.0**-130])
    record = encode_arrays(State({Name("a", "R"): values}), "bfloat16")
    assert list(record) == ["trained:bfloat16"]
    stored = record["trained:bfloat16"].numpy()
    assert stored.dtype == np.int16
    assert stored.tobytes() == b"".join(struct.pack("<f", v)[2:] for v in values.tolist())
    assert torch.equal(decode_arrays(record)["trained"], values)


def test_bfloat16_rounds_to_the_nearest() -> None:
    """Eight significant bits: 1 + 2^-7 is there, 1 + 2^-9 goes down and 1 + 3 · 2^-9 up."""
    state = State({Name("a", "R"): torch.tensor([1 + 2.0**-7, 1 + 2.0**-9, 1 + 3 * 2.0**-9])})
    assert quantise(state, "bfloat16")[Name("a", "R")].tolist() == [1 + 2.0**-7, 1.0, 1 + 2.0**-7]


@law
@given(st.integers(0, 4), st.integers(0, 4), dtypes, st.lists(st.text(max_size=5), max_size=3))
def test_an_instruction_comes_back(since: int, more: int, dtype: str, labels: list[str]) -> None:
    log = FrozenLog()
    log.append(State({Name("x", "A"): gaussian(2, 5), Name("x", "B"): gaussian(4, 2)}))
    for version in range(more):
        log.append(State({Name("x", "U"): gaussian(4, 1, seed=version), Name("x", "V"): gaussian(1, 5, seed=-version)}))
    state, bundle = mixed(3, 2), log.bundle(min(since, log.version))
    sent = Instruction("client-ä", 7, "core", log.head, tuple(labels), digest=Layout.of(state).digest)
    got = decode_instruction(encode_instruction(sent, encode_shared(encode_arrays(state, dtype), bundle)))
    assert (got.client, got.round, got.stage, got.frozen, got.labels) == ("client-ä", 7, "core", log.head, tuple(labels))
    rounded = quantise(state, dtype)
    assert all(torch.equal(t, rounded[name]) for name, t in got.state(Layout.of(state)).items())
    assert (got.bundle is None) == (bundle is None)
    if bundle is not None and got.bundle is not None:
        assert (got.bundle.parent, got.bundle.head) == (bundle.parent, bundle.head)
        assert got.bundle.state.keys() == bundle.state.keys()
        assert all(torch.equal(t, bundle.state[name]) for name, t in got.bundle.state.items())


def test_messages_of_a_round_may_share_their_arrays() -> None:
    """The bundle of one client goes into a record of its own and not into the shared one."""
    arrays = encode_arrays(cores(2, 3))
    log = FrozenLog()
    log.append(State({Name("x", "U"): gaussian(4, 1), Name("x", "V"): gaussian(1, 5)}))
    encode_shared(arrays, log.bundle(0))
    assert list(arrays) == ["trained"]
    assert decode_instruction(encode_instruction(Instruction("b", 1), encode_shared(arrays, None))).bundle is None


def replaced(**changes: Any) -> RecordDict:
    """Return a reply with R (2, 2) of 'a' and 'b', with metrics replaced."""
    content = encode_reply(State({Name(m, "R"): torch.zeros(2, 2) for m in "ab"}), 5, {})
    return RecordDict({"arrays": content["arrays"], "metrics": MetricRecord({**content.metric_records["metrics"], **changes})})


WANTED = Layout.of(State({Name(m, "R"): torch.zeros(2, 2) for m in "ab"}))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({("a", "R"): (2, 2)}, r"group 'trained' holds 4 values, expected 8"),
        ({("a", "R"): (2, 2), ("b", "R"): (2, 2), ("c", HEAD): (1,)}, r"groups are \['head', 'trained'\], expected \['trained'\]"),
        (
            {("a", "R"): (2, 2), ("c", "R"): (2, 2)},
            r"as many values as the expected [0-9a-f]{12}, but other names or shapes than R of 'a' \[2, 2\] to R of 'b' \[2, 2\]; model",
        ),
        ({("a", "R"): (4, 1), ("b", "R"): (2, 2)}, r"but other names or shapes"),
        ({}, r"groups are \[\], expected \['trained'\]"),
    ],
)
def test_a_reply_of_another_layout_is_refused(state: dict[tuple[str, str], tuple[int, ...]], message: str) -> None:
    reply = decode_reply(encode_reply(State({Name(*n): torch.zeros(s) for n, s in state.items()}), 5, {}))
    with pytest.raises(LayoutError, match=message):
        reply.state(WANTED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RecordDict({"arrays": ArrayRecord()}), r"needs a MetricRecord 'metrics' with 'num-examples'; it holds \['arrays'\]"),
        (RecordDict({"metrics": MetricRecord({"loss": 1.0})}), r"needs a MetricRecord 'metrics' with 'num-examples'"),
        (replaced(**{"num-examples": 2.5}), r"metric 'num-examples' is 2\.5, expected a whole number"),
        (replaced(**{"num-examples": [1, 2]}), r"metric 'num-examples' is \[1, 2\], expected a whole number"),
        (replaced(loss=[1.0]), r"metric 'loss' is \[1\.0\], expected a number"),
        (RecordDict({**replaced(), "arrays": ArrayRecord({"trained": Array(np.zeros(8))})}), r"\(float64 \[8\]\) is not of a wire dtype"),
        (
            RecordDict({**replaced(), "arrays": ArrayRecord({"trained:int3": Array(np.zeros(8, np.int16))})}),
            r"'trained:int3' .* not of a wire",
        ),
        (
            RecordDict({**replaced(), "arrays": ArrayRecord({"trained": Array("float32", (8,), "numpy.ndarray", b"no array")})}),
            r"the array of group 'trained' cannot be read",
        ),
        (
            RecordDict({**replaced(), "arrays": ArrayRecord({"trained": Array("float32", (8,), "pickle", b"\x80\x04N.")})}),
            r"the array of group 'trained' cannot be read",
        ),
    ],
)
def test_a_reply_that_cannot_be_read_is_refused(content: RecordDict, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        decode_reply(content)


def test_a_config_record_in_the_place_of_the_metrics_is_refused() -> None:
    with pytest.raises(LayoutError, match="needs a MetricRecord"):
        decode_reply(RecordDict({"metrics": ConfigRecord({"num-examples": 3})}))


def test_a_client_that_lacks_frozen_state_says_so() -> None:
    assert decode_reply(encode_missing()).missing
    assert payload_bytes(encode_missing()) == 0


@law
@given(sizes, st.integers(1, 40), dtypes, st.booleans())
def test_payload_and_overhead_are_the_whole_message(rank: int, modules: int, dtype: str, bundled: bool) -> None:
    """Up to the varints that grow with an array's length, which are few: 64 bytes."""
    state = cores(modules, rank)
    log = FrozenLog()
    log.append(State({Name("x", "A"): gaussian(rank, 5), Name("x", "B"): gaussian(4, rank)}))
    instruction = Instruction("client-0", 3, frozen=log.head, digest=Layout.of(state).digest)
    shared = encode_shared(encode_arrays(state, dtype), log.bundle(0) if bundled else None)
    for content, frozen in (
        (encode_reply(state, 100, {"loss": 1.0, "steps": 7}, dtype), 0),
        (encode_instruction(instruction, shared), 9 * rank if bundled else 0),
    ):
        assert payload_bytes(content) == layout_bytes(Layout.of(state), dtype) + 4 * frozen
        assert abs(payload_bytes(content) + overhead_bytes(content) - recorddict_to_proto(content).ByteSize()) <= 64


def test_a_reply_of_36_cores_costs_little_more_than_its_values() -> None:
    """36 modules, r = 8, float32: 36 · 8 · 8 · 4 = 9216 bytes."""
    content = encode_reply(cores(36, 8), 160, {"loss": 0.7, "steps": 10})
    assert payload_bytes(content) == 9216
    assert recorddict_to_proto(content).ByteSize() <= 1.06 * 9216
    objects = get_all_nested_objects(content)
    assert sum(len(part.deflate()) for part in objects.values()) <= 1.15 * 9216


def test_the_root_of_the_frozen_log_goes_without_a_bundle() -> None:
    got = decode_instruction(encode_instruction(Instruction("a", 1), encode_shared(ArrayRecord(), None)))
    assert got.frozen == ROOT
    assert got.bundle is None


@pytest.mark.parametrize("dtype", ["float32", "int16", "int8"])
@pytest.mark.parametrize("size", [0, 1, 7, 4096, 100_003])
def test_flat_values_are_written_as_flower_writes_them(dtype: str, size: int) -> None:
    values = (np.arange(size) % 1000).astype(dtype)
    assert _encoded(values) == Array(values)


@pytest.mark.parametrize(
    ("values", "finite"),
    [([3e38, 3e38, 1.0], True), ([3e38, float("inf")], False), ([float("inf"), -float("inf")], False), ([1.0, float("nan")], False)],
)
def test_a_sum_that_overflows_is_no_sign_of_infinity(values: list[float], finite: bool) -> None:
    assert Reply({"trained": torch.tensor(values)}, 0, 1, {}).finite is finite


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_finite_in_int8_either(broken: float) -> None:
    state = State({Name("x", "A"): torch.tensor([1.0, broken, 2.0])})
    reply = decode_reply(encode_reply(state, 1, {}, "int8"))
    assert not reply.finite
    assert bool(reply.state(Layout.of(state))[Name("x", "A")].isnan().all())


def test_bytes_that_are_not_of_the_layout_are_refused() -> None:
    reply = decode_reply(encode_reply(State({Name("x", "A"): torch.ones(65)}), 1, {}, "int8"))
    with pytest.raises(LayoutError, match=r"group 'trained' holds 73 bytes of int8 values and scales, expected 74 for 66 values"):
        reply.state(Layout.of(State({Name("x", "A"): torch.ones(33), Name("x", "B"): torch.ones(33)})))
