"""Questions that lines, plots and reports all ask of a run's records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from fedsb.run.records import SHARED, RoundRecord

LOWER_IS_BETTER = frozenset({"loss", "clipped_loss", "perplexity", "mse", "rmse", "mae", "parse_failures"})
# What scores are read beside: no quality of a model. The chance level has a line of its own in a plot, a count has none.
BESIDE = frozenset({"chance", "choice_chance", "examples"})
UNDRAWN = frozenset({"examples"})
PAYLOADS = ("payload_up", "payload_down", "payload_one_off")


def metric_names(records: Sequence[RoundRecord]) -> list[str]:
    """Return the names of the server's metrics, in the order in which they first appear."""
    return list(dict.fromkeys(name for record in records for name in record.metrics))


def primary_metric(records: Sequence[RoundRecord]) -> str | None:
    """Return the first metric of which more is better, else the first, else None."""
    names = metric_names(records)
    return next((name for name in names if name not in LOWER_IS_BETTER | BESIDE), names[0] if names else None)


def final_metrics(records: Sequence[RoundRecord]) -> dict[str, float]:
    """Return the metrics of the last record that has any."""
    return next((dict(record.metrics) for record in reversed(records) if record.metrics), {})


def metrics_of(records: Sequence[RoundRecord], summary: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics of the round that a run has chosen, as its summary says, else those of the last record that has any."""
    chosen = (summary or {}).get("selected")
    return final_metrics([record for record in records if not chosen or record.round == chosen["round"]])


def round_of(records: Sequence[RoundRecord], summary: Mapping[str, Any] | None) -> int:
    """Return the round that a run has left: the one that it has chosen, as its summary says, else its last."""
    chosen = (summary or {}).get("selected")
    return int(chosen["round"]) if chosen else records[-1].round


def curve(records: Sequence[RoundRecord], metric: str, along: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return a metric and what it is drawn along, which has a value a record, at the rounds that measured it."""
    measured = [(x, record.metrics[metric]) for x, record in zip(along, records, strict=True) if metric in record.metrics]
    return [x for x, _ in measured], [y for _, y in measured]


def totals(records: Sequence[RoundRecord]) -> dict[str, int]:
    """Return the bytes of a whole run: each payload, their sum with and without the one-off, and the overhead."""
    sums = {key: sum(getattr(record, key) for record in records) for key in (*PAYLOADS, "overhead")}
    recurring = sums["payload_up"] + sums["payload_down"]
    return sums | {"payload_total": recurring + sums["payload_one_off"], "payload_total_without_one_off": recurring}


def cumulative(records: Sequence[RoundRecord], *keys: str) -> list[int]:
    """Return the running sum of the given byte counts."""
    return list(accumulate(sum(getattr(record, key) for key in keys) for record in records))


def largest_gap(records: Sequence[RoundRecord], kind: str = "exactness_gap") -> float | None:
    """Return the largest gap of any round, or None where none was measured; a NaN wins, since it hides the largest.

    ``kind`` is ``exactness_gap`` or ``held_gap``; of ``gap_error`` it is the largest standard error.
    """
    gaps = [gap for record in records if (gap := getattr(record, kind)) is not None]
    return max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap, default=None)


def largest_extra(records: Sequence[RoundRecord], key: str) -> float | None:
    """Return the largest value of any round's extras under a key; None where none has it."""
    return max((record.extras[key] for record in records if key in record.extras), default=None)


def total_or_none(parts: Sequence[float | None]) -> float | None:
    """Return the sum, or None where a part of it is not told."""
    told = [part for part in parts if part is not None]
    return sum(told) if len(told) == len(parts) else None


def mean_over_clients(record: RoundRecord) -> dict[str, float]:
    """Return the plain mean of each client metric, but for those of the shared part alone."""
    rows: list[Mapping[str, float]] = list(record.client_metrics.values())
    names = dict.fromkeys(name for row in rows for name in row if not name.startswith(SHARED))
    return {name: _mean([row[name] for row in rows if name in row]) for name in names}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
