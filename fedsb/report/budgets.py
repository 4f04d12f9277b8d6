"""The sections of a comparison that say what methods were given, and how their clients fare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from fedsb.report.clients import PERSONAL, client_spread
from fedsb.report.drawing import ratio
from fedsb.report.groups import Group
from fedsb.report.markdown import table
from fedsb.report.series import totals
from fedsb.report.table import human_bytes, number
from fedsb.run.records import SHARED

EQUAL = 1.01


def budgets_text(groups: Sequence[Group]) -> str:
    """Return rank, trained values, rate and bytes of each method, and in which of three ways their budgets are equal."""
    body = [
        [
            group.label,
            "–" if math.isnan(rank := _rank(group)) else f"{rank:.0f}",
            f"{_trained(group):,.0f}",
            group.first.setting("train.lr"),
            *(human_bytes(mean_bytes(group, *keys)) for keys in (("payload_up", "payload_down"), ("payload_one_off",), ("payload_total",))),
        ]
        for group in groups
    ]
    head = ["method", "rank", "trained values", "rate", "up and down", "one-off", "total"]
    return f"{table(head, body)}\n\n{_equal(groups)}"


def _rank(group: Group) -> float:
    rank = (group.first.summary or {}).get("rank")
    return math.nan if rank is None else float(rank)


def _trained(group: Group) -> float:
    return float((group.first.summary or {})["trained_params"])


def mean_bytes(group: Group, *keys: str) -> float:
    """Return what a run of a group moves of some payloads, the mean over seeds."""
    return statistics.fmean(sum(totals(run.records)[key] for key in keys) for run in group.runs.values())


WAYS: dict[str, Callable[[Group], float]] = {
    "rank": _rank,
    "trained values": _trained,
    "bytes": lambda group: mean_bytes(group, "payload_total"),
}


def _equal(groups: Sequence[Group]) -> str:
    moving = [group for group in groups if group.moves]
    if len(moving) < 2:
        return ""
    spreads = {way: ratio([value for group in moving if not math.isnan(value := of(group))]) for way, of in WAYS.items()}
    equal = [way for way, spread in spreads.items() if spread <= EQUAL]
    apart = [f"{way} (the largest is {spread:.3g} times the smallest)" for way, spread in spreads.items() if spread > EQUAL]
    others = f" They differ in {_listed(apart)}." if apart else ""
    return f"Of rank, trained values and bytes, the {len(moving)} federated methods are equal in {_listed(equal) or 'none'}.{others}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def clients_text(groups: Sequence[Group], metric: str) -> str:
    """Return how a metric of the clients' own parts spreads over them, by method; empty where no client was measured."""
    body = [_client_row(group, name, kind) for group in groups for name, kind in _models(group, metric).items()]
    if not body:
        return ""
    head = ["method", "model", "clients", "mean", "standard deviation", "worst tenth"]
    personal = any(row[1] == "personal" for row in body)
    shown = table(head, body)
    lead = f"{metric} on what each client holds out, each client counted once; means over the seeds."
    return f"{lead}\n\n{shown}" + (f"\n\n{PERSONAL}" if personal else "")


def _client_row(group: Group, name: str, kind: str) -> list[object]:
    figures = (number(_over(group, name, key)) for key in ("mean", "std", "worst_tenth"))
    return [group.label, kind, f"{_over(group, name, 'clients'):.0f}", *figures]


def _models(group: Group, metric: str) -> dict[str, str]:
    """Return which models of a group were measured by its clients, by the name of the metric."""
    found = client_spread(group.first.records)
    if metric not in found:
        return {}
    return {metric: "personal", f"{SHARED}{metric}": "shared"} if f"{SHARED}{metric}" in found else {metric: "the one model"}


def _over(group: Group, name: str, key: str) -> float:
    """Return the mean over seeds of a figure of :func:`fedsb.report.clients.client_spread`."""
    values = [row[name][key] for run in group.runs.values() if name in (row := client_spread(run.records))]
    return statistics.fmean(values) if values else math.nan
