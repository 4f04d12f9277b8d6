"""What goes over a worker's socket comes out as it went in, and what is no frame, or too long, is left."""

from __future__ import annotations

import json
import socket
import struct
import threading

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.resident.frames import MAGIC, MOST_HEAD, BadFrame, Frame, receive, send
from fedsb.resident.records import framed, unframed

TEXT = st.text(max_size=8)
NUMBERS = st.one_of(st.integers(-(2**62), 2**62), st.floats(allow_nan=False))
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.sampled_from(["float32", "int8", "bfloat16"]), st.lists(st.integers(0, 5), max_size=3), st.binary(max_size=40)),
    max_size=3,
)
RECORDS = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.one_of(
        ARRAYS.map(lambda found: ArrayRecord({k: Array(dtype, tuple(shape), "own", data) for k, (dtype, shape, data) in found.items()})),
        st.dictionaries(TEXT, st.one_of(NUMBERS, st.lists(st.integers(-9, 9), max_size=3), st.lists(st.floats(0, 1), max_size=3))).map(
            MetricRecord
        ),
        st.dictionaries(
            TEXT,
            st.one_of(NUMBERS, TEXT, st.booleans(), st.binary(max_size=9), st.lists(st.binary(max_size=5), max_size=3), st.lists(TEXT)),
        ).map(ConfigRecord),
    ),
    max_size=4,
)


def over_a_socket(frame: Frame, most: int = 2**20) -> Frame:
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=send, args=(here, frame))
        sender.start()
        there.settimeout(5)
        try:
            return receive(there, most)
        finally:
            there.close()
            sender.join(5)


@settings(max_examples=150)
@given(RECORDS)
def test_records_come_through_to_the_bit(records: dict[str, ArrayRecord | MetricRecord | ConfigRecord]) -> None:
    found = unframed(over_a_socket(framed(RecordDict(records), kind="train", run=2**62)))  # type: ignore[arg-type]
    assert list(found) == list(records)
    for key, record in records.items():
        assert type(found[key]) is type(record)
        if isinstance(record, ArrayRecord):
            parts = [[(k, a.dtype, tuple(a.shape), a.stype, a.data) for k, a in each.items()] for each in (record, found[key])]  # type: ignore[union-attr]
            assert parts[0] == parts[1]
        else:
            assert [(k, type(v), v) for k, v in record.items()] == [(k, type(v), v) for k, v in found[key].items()]


def test_numbers_that_are_none_come_through() -> None:
    found = unframed(over_a_socket(framed(RecordDict({"m": MetricRecord({"a": float("nan"), "b": float("-inf")})}))))
    assert np.isnan(found["m"]["a"])  # type: ignore[index]
    assert found["m"]["b"] == float("-inf")  # type: ignore[index]


def raw(head: bytes, *blobs: bytes, magic: bytes = MAGIC, length: int | None = None) -> bytes:
    return magic + struct.pack(">Q", len(head) if length is None else length) + head + b"".join(blobs)


def said(sizes: object, head: object = None) -> bytes:
    return json.dumps({"head": {} if head is None else head, "sizes": sizes}).encode()


BROKEN: dict[str, tuple[bytes, type[Exception], str]] = {
    "another beginning": (raw(said([]), magic=b"GET / HTTP/1.1\n"), BadFrame, "does not begin"),
    "an endless head": (raw(b"", length=2**63), BadFrame, "a head of"),
    "a head one byte too long": (raw(b"", length=MOST_HEAD + 1), BadFrame, "a head of"),
    "no JSON": (raw(b"{"), BadFrame, "can't be read"),
    "deep JSON": (raw(b"[" * 100_000), BadFrame, "can't be read"),
    "not UTF-8": (raw(b"\xff\xfe{}"), BadFrame, "can't be read"),
    "no sizes": (raw(b'{"head": {}}'), BadFrame, "can't be read"),
    "a list for a head": (raw(b'{"head": [], "sizes": []}'), BadFrame, "says no lengths"),
    "a size below nothing": (raw(said([5, -5])), BadFrame, "says no lengths"),
    "a size that is true": (raw(said([True])), BadFrame, "says no lengths"),
    "a size of parts": (raw(said([1.5])), BadFrame, "says no lengths"),
    "an endless message": (raw(said([2**60])), BadFrame, "more than the 1,000 bytes"),
    "many that are too much together": (raw(said([600, 600])), BadFrame, "a message of 2 arrays"),
    "one that ends too early": (raw(said([10]), b"12345"), ConnectionError, "is gone"),
    "nothing": (b"", ConnectionError, "is gone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_frame_is_left(case: str) -> None:
    sent, kind, line = BROKEN[case]
    here, there = socket.socketpair()
    with here, there:
        writer = threading.Thread(target=lambda: (here.sendall(sent), here.shutdown(socket.SHUT_WR)))
        writer.start()
        with pytest.raises(kind, match=line):
            receive(there, 1000)
        writer.join(5)


def test_a_peer_that_falls_silent_is_left() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(MAGIC)
        there.settimeout(0.05)
        with pytest.raises(TimeoutError):
            receive(there, 1000)


NO_RECORDS: dict[str, Frame] = {
    "none": Frame({}),
    "a list": Frame({"records": []}),
    "another kind": Frame({"records": {"a": {"pickle": "x"}}}),
    "two kinds": Frame({"records": {"a": {"metrics": {}, "config": {}}}}),
    "an array too many": Frame({"records": {}}, (b"x",)),
    "an array too few": Frame({"records": {"a": {"arrays": [["x", "float32", [1], "own"]]}}}),
    "no array": Frame({"records": {"a": {"arrays": [["x"]]}}}, (b"x",)),
    "a nested value": Frame({"records": {"a": {"config": {"x": {"y": {}}}}}}),
    "no base64": Frame({"records": {"a": {"config": {"x": {"bytes": "%"}}}}}),
    "a metric that is a word": Frame({"records": {"a": {"metrics": {"x": "y"}}}}),
}


@pytest.mark.parametrize("case", NO_RECORDS)
def test_what_are_no_records_is_left(case: str) -> None:
    with pytest.raises(BadFrame):
        unframed(NO_RECORDS[case])


def test_memory_is_taken_as_bytes_arrive() -> None:
    """A length that is said costs nothing."""
    import tracemalloc

    here, there = socket.socketpair()
    with here, there:
        here.sendall(raw(said([2**40]), b"x" * 100))
        here.shutdown(socket.SHUT_WR)
        tracemalloc.start()
        with pytest.raises(ConnectionError):
            receive(there, 2**41)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**23
