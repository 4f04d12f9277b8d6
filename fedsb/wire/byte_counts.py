"""Bytes of messages: what the protocol moves, and the serialised rest."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.serde import recorddict_to_proto


def payload_bytes(content: RecordDict) -> int:
    """Bytes of what the protocol moves: number of values times item size, over all arrays."""
    return sum(array_bytes(record) for record in content.array_records.values())


def array_bytes(record: ArrayRecord) -> int:
    """Bytes of the values in one record."""
    return sum(_values_bytes(a) for a in record.values())


def _values_bytes(array: Array) -> int:
    """Bytes of an array's values; 0 for one whose header cannot be true, so that all of a broken array counts as overhead."""
    try:
        whole = all(isinstance(n, int) and n >= 0 for n in array.shape)
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize if whole and array.dtype in np.sctypeDict else 0
    except TypeError:  # Flower reads a header from JSON, which may hold anything
        return 0
    return size if size <= len(array.data) else 0


def float32_bytes(numel: int) -> int:
    """Bytes of so many values in float32, as the frozen log and a start travel on every wire."""
    return 4 * numel


def overhead_bytes(content: RecordDict) -> int:
    """Bytes of the serialised rest: array headers, names, metrics and configuration.

    The arrays are counted and not serialised, which would copy them; the few bytes of varints that grow with an array's
    length are the only ones left out.
    """
    rest: int = recorddict_to_proto(RecordDict({k: r for k, r in content.items() if not isinstance(r, ArrayRecord)})).ByteSize()
    for key, record in content.array_records.items():
        # Not that of a broken array which protobuf could not carry: whoever reads it refuses it.
        with suppress(TypeError, ValueError):
            rest += _shell_bytes(key, tuple((k, a.dtype, tuple(a.shape), a.stype) for k, a in record.items()))
        rest += sum(len(a.data) for a in record.values())
    return rest - payload_bytes(content)


@lru_cache(maxsize=64)
def _shell_bytes(key: str, arrays: tuple[tuple[str, str, tuple[int, ...], str], ...]) -> int:
    """Bytes of a record of arrays without their data: the same for every client's reply."""
    shells = ArrayRecord({name: Array(dtype=dtype, shape=shape, stype=stype, data=b"") for name, dtype, shape, stype in arrays})
    return int(recorddict_to_proto(RecordDict({key: shells})).ByteSize())
