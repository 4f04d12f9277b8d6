"""What a tracker gets of a record: its numbers, each by a name, and nothing that the record does not hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedsb.run.records import RoundRecord

IDENTITY = ("method", "model", "data", "rank", "seed", "clients", "rounds", "factors_sha256")


def numbers_of(record: RoundRecord) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl``: by the keys that lead there, with ``/`` between; null and truth are none.

    Of names (clients, failures) and reasons there is the count.
    """
    row = json.loads(record.to_json())
    counts = {key: float(len(row.pop(key))) for key in ("clients", "failed", "remarks")}
    return counts | dict(_leaves({key: value for key, value in row.items() if key != "round"}, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def identity_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return what tells a run from others, of its summary."""
    return {key: str(summary[key]) for key in IDENTITY if summary.get(key) is not None}
