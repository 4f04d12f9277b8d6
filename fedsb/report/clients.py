"""What a run says of its clients: who holds what, and how unlike they fare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedsb.report.intervals import deviation
from fedsb.report.series import LOWER_IS_BETTER
from fedsb.report.table import number, plural
from fedsb.run.folder import Run
from fedsb.run.records import CLIENTS, SHARED, RoundRecord

MOST_CLIENTS = 50
MOST_LABELS = 12
PERSONAL = (
    "*Personal* is each client's own model; *shared* is what one that has never trained would use: what the server sends, with the part "
    "that clients keep as the start has it. Of `fedsa_lora` and `local_only`, whose B begins at zero and whose head stays at home, that is "
    "the untouched base."
)
NOISED = "The metrics have noise: *noise* is its standard deviation on an accuracy, and on a clipped loss over `privacy.eval_max_loss`."
UNMEASURED = "No metric was measured on clients: `federation.evaluate_clients=true data.client_test_fraction=0.1` does."


def by_clients(run: Run) -> bool:
    """Tell whether a run's metrics are those of its clients, each of which keeps a part of the model: there is no one model to measure."""
    return any(record.measured_by == CLIENTS for record in run.records)


def measured_where(run: Run) -> str:
    """Say on what the run's metrics are measured."""
    return "the clients' own parts" if by_clients(run) else "the test part"


def told_apart(runs: Sequence[Run]) -> str:
    """Say whose metrics are measured on other examples than the rest; empty where all are measured alike."""
    apart = dict.fromkeys(run.method for run in runs if by_clients(run))
    if not apart or all(run.method in apart for run in runs):
        return ""
    verb, whose = ("is", "its") if len(apart) == 1 else ("are", "their")
    return (
        f"Not to be held against the others: {', '.join(apart)} {verb} measured by {whose} clients, each on the part that it holds out, "
        "with factors of its own, and the rest by the server on the test part."
    )


def client_spread(records: Sequence[RoundRecord]) -> dict[str, dict[str, Any]]:
    """Return how each metric of the clients spreads over them, in the last round that has any.

    Returns:
        By metric: ``mean`` (each client counts once), ``weighted`` (by the examples that each holds out), ``std`` (of a sample; 0 for one
        client), ``worst``, ``worst_client``, ``worst_tenth`` (the mean of the worst tenth of the clients, at least one), ``clients``. Who
        holds nothing out counts nowhere; whose metric is NaN, as a loss may become, counts as the worst, and makes means NaN.
    """
    record = next((record for record in reversed(records) if record.client_metrics), RoundRecord(0))
    last = record.client_metrics
    names = dict.fromkeys(name for row in last.values() for name in row)
    return {name: _spread(name, {client: row[name] for client, row in last.items() if name in row}, record.held_out) for name in names}


def _spread(name: str, values: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, Any]:
    sign = -1 if name.removeprefix(SHARED) in LOWER_IS_BETTER else 1
    ranked = sorted(sorted(values), key=lambda client: _badness(sign * values[client]))
    worst, tenth = ranked[0], ranked[: math.ceil(len(ranked) / 10)]
    # Records of earlier versions have no counts.
    weighted = statistics.fmean(values.values(), [counts[client] for client in values]) if counts.keys() >= values.keys() else None
    return {
        "mean": statistics.fmean(values.values()), "weighted": weighted, "std": deviation(values.values()),
        "worst": values[worst], "worst_client": worst, "worst_tenth": statistics.fmean(values[client] for client in tenth),
        "clients": len(values),
    }  # fmt: skip


def _badness(score: float) -> float:
    """Return what the worst have least of: what is no number is worse than all."""
    return -math.inf if math.isnan(score) else score


def spread_rows(records: Sequence[RoundRecord]) -> list[tuple[str, ...]]:
    """Return metric, mean, mean weighted by held-out examples, spread, worst tenth and worst of the clients as they are shown."""
    found = client_spread(records)
    return [
        (
            _called(name, found),
            number(row["mean"]),
            "–" if row["weighted"] is None else number(row["weighted"]),
            number(row["std"]),
            number(row["worst_tenth"]),
            f"{number(row['worst'])} ({row['worst_client']})",
        )
        for name, row in found.items()
    ]


def _called(name: str, all_of: Collection[str]) -> str:
    """Name a metric of a personal model, or of what is shared of it, where there are both."""
    if name.startswith(SHARED):
        return f"{name.removeprefix(SHARED)}, shared"
    return f"{name}, personal" if f"{SHARED}{name}" in all_of else name


def spread_text(records: Sequence[RoundRecord]) -> str:
    """Say what the spread over clients is of: which models, and how many clients hold nothing out; empty where there is nothing to say."""
    last = next((record.client_metrics for record in reversed(records) if record.client_metrics), {})
    silent = sum(not row for row in last.values())
    said = [PERSONAL] if any(name.startswith(SHARED) for row in last.values() for name in row) else []
    if any("noise" in row for row in last.values()):
        said.append(NOISED)
    if silent:
        said.append(f"Nothing is held out at {silent} of {plural(len(last), 'client')}, left out here; that is no failure.")
    return " ".join(said)


def partition_text(run: Run) -> str:
    """Return how the examples are dealt out, in one sentence; empty where the run does not tell."""
    partition = (run.summary or {}).get("partition")
    if not partition:
        return ""
    sizes = list(partition["sizes"].values())
    skew = "" if partition["label_skew"] is None else f"; label skew **{partition['label_skew']:.2f}**, from 0 (all alike) to 1"
    held_out = run.setting("data.client_test_fraction")
    of_these = f", of which they hold {held_out:.0%} out to evaluate on" if held_out else ""
    group = "" if partition.get("group_skew") is None else f"; {partition['dealt_by']} skew **{partition['group_skew']:.2f}**"
    by_size = partition.get("dealt_by") == "quantity"
    sized = f"; size skew **{partition['size_skew']:.2f}**" if by_size and partition.get("size_skew") is not None else ""
    return (
        f"{plural(len(sizes), 'client')} hold {sum(sizes):,} examples, {min(sizes):,} to {max(sizes):,} each{of_these}{skew}{group}{sized}."
    )


def client_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table of clients: size, label shares, own metrics; of the first :data:`MOST_CLIENTS`."""
    partition = (run.summary or {}).get("partition") or {"sizes": {}, "labels": [], "label_shares": {}}
    record = next((record for record in reversed(run.records) if record.client_metrics), RoundRecord(0))
    measured, held_out = record.client_metrics, record.held_out
    metrics = list(dict.fromkeys(name for row in measured.values() for name in row))
    labels = partition["labels"] if len(partition["labels"]) <= MOST_LABELS else []
    clients = list(dict.fromkeys([*partition["sizes"], *sorted(measured)]))[:MOST_CLIENTS]
    head = ["client", *(["examples"] if partition["sizes"] else []), *labels, *(["held out"] if held_out else []), *metrics]
    own = {client: [measured.get(client, {}).get(name) for name in metrics] for client in clients}
    counts = {client: [f"{held_out.get(client, 0):,}"] if held_out else [] for client in clients}
    return head, [_client_row(client, partition, bool(labels), counts[client], own[client]) for client in clients]


def _client_row(
    client: str, partition: Mapping[str, Any], labelled: bool, counts: Sequence[str], metrics: Sequence[float | None]
) -> list[str]:
    size = [f"{partition['sizes'][client]:,}" if client in partition["sizes"] else "–"] if partition["sizes"] else []
    shares = partition["label_shares"].get(client, []) if labelled else []
    return [client, *size, *(f"{share:.0%}" for share in shares), *counts, *("–" if value is None else number(value) for value in metrics)]
