"""What a tracker gets of a record: its numbers, each by a name, and nothing that the record does not hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedsb.run.records import RoundRecord

ODD = re.compile(r"[^\w.-]")  # what the name of a key may not hold, of one tracker or another
LONGEST = 80  # characters of it; MLflow takes 250 for the whole path
IDENTITY = ("method", "model", "data", "rank", "seed", "clients", "rounds", "factors_sha256")


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl``: by the keys that lead there, with ``/`` between; null and truth are none.

    Of names (clients, failures) and reasons there is the count. A key that a tracker would take for a path, or for another one with its
    signs replaced, as a client's name may be, has them replaced here, with a hash behind.
    """
    row = json.loads(record.to_json())
    counts = {key: float(len(row.pop(key))) for key in ("clients", "failed", "remarks")}
    return counts | dict(_leaves({key: value for key, value in row.items() if key != "round"}, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{_called(key)}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{_called(key)}", float(value)


def _called(key: str) -> str:
    plain = ODD.sub("_", key)[:LONGEST]
    return key if plain == key and key.strip(".") else f"{plain}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"


def identity_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells a run from others, of its summary."""
    return {key: str(summary[key]) for key in IDENTITY if summary.get(key) is not None}
