"""Flower's records as JSON and bytes: every kind that there is, to the bit, without a bound of 2 GiB."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedsb.resident.frames import BadFrame, Frame


def framed(content: RecordDict, **head: Any) -> Frame:
    """Return a frame with the records, and with what else stands in its head."""
    blobs: list[bytes] = []
    records = {key: _written(record, blobs) for key, record in content.items()}
    return Frame({**head, "records": records}, tuple(blobs))


def _written(record: ArrayRecord | MetricRecord | ConfigRecord, blobs: list[bytes]) -> dict[str, Any]:
    if isinstance(record, ArrayRecord):
        blobs.extend(array.data for array in record.values())
        return {"arrays": [[name, array.dtype, list(array.shape), array.stype] for name, array in record.items()]}
    if isinstance(record, MetricRecord):
        return {"metrics": dict(record)}
    return {"config": {key: _plain(value) for key, value in record.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, list) and value and isinstance(value[0], bytes):
        return {"all": [base64.b64encode(each).decode() for each in value]}
    return value


def unframed(frame: Frame) -> RecordDict:
    """Return the records of a frame.

    Raises:
        BadFrame: they are none.
    """
    blobs = iter(frame.blobs)
    try:
        found = RecordDict({key: _read(said, blobs) for key, said in frame.head["records"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadFrame(f"its records can't be read: {error}") from None
    if more := sum(1 for _ in blobs):
        raise BadFrame(f"{more} arrays more than its records name")
    return found


def _read(said: Mapping[str, Any], blobs: Iterator[Any]) -> ArrayRecord | MetricRecord | ConfigRecord:
    [(kind, value)] = said.items()
    if kind == "arrays":
        return ArrayRecord({name: Array(dtype, tuple(shape), stype, bytes(_next(blobs))) for name, dtype, shape, stype in value})
    if kind == "metrics":
        return MetricRecord(value)
    if kind == "config":
        return ConfigRecord({key: _of_plain(each) for key, each in value.items()})
    raise ValueError(f"a record of kind '{kind}'")


def _next(blobs: Iterator[Any]) -> Any:
    if (blob := next(blobs, None)) is None:
        raise ValueError("fewer arrays than its records name")
    return blob


def _of_plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, text)] = value.items()
    return OF_PLAIN[kind](text)


OF_PLAIN: Mapping[str, Callable[[Any], Any]] = {
    "bytes": lambda text: base64.b64decode(text, validate=True),
    "all": lambda texts: [base64.b64decode(text, validate=True) for text in texts],
}
