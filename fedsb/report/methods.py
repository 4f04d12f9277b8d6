"""The sections of a comparison that are of methods over their seeds: means, paired differences, bytes to equal quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedsb.core.errors import UserError
from fedsb.report.groups import Group
from fedsb.report.intervals import standard_error
from fedsb.report.markdown import table
from fedsb.report.pairing import Compared
from fedsb.report.resampling import DRAWS, Difference
from fedsb.report.sanity import chance
from fedsb.report.series import metric_names, metrics_of, primary_metric, totals
from fedsb.report.table import bound, human_bytes, number, plural
from fedsb.report.until import reach

# What most tables show, of what is a mean over test items.
BY_ITEMS = ("exact_match", "accuracy_norm", "accuracy", "mse", "loss")
PAIRED = (
    "{metric} of each minus that of {reference}, seed by seed and test item by test item ({items} items a seed). In brackets: intervals "
    "at 95%, percentiles of {draws:,} draws of the seeds and, within each, of its items, by a fixed generator. Bold: the interval leaves "
    "zero out. Of S seeds a bootstrap takes the variance between them too small, by (S − 1)/S; where seeds share some of their items and "
    "not all, as random parts of one table do, these count as others, and intervals of many seeds are too narrow."
)
SHARED_ITEMS = " Seeds that were measured on the same items share the draw of these."
UNTIL = (
    "Target: {metric} {target}{why}. *Round* and *bytes* are where the mean over seeds first reaches it in a round that was measured, with "
    "the bytes of the start and of all rounds until then, summed over clients; *runs* counts those that reach it by themselves."
)


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for; None where it may choose.

    Attributes:
        against: method, or label of a group, that all others are held against.
        metric: by which.
        target: value of the metric, for bytes to equal quality.
        tuned: how the rates were chosen, in words.
    """

    against: str | None = None
    metric: str | None = None
    target: float | None = None
    tuned: str | None = None


def metric_of(groups: Sequence[Group], asked: str | None) -> str | None:
    """Return by which metric methods are compared: the runs' first of which more is better, where it is a mean over test items.

    Raises:
        UserError: no run has the metric that is asked for.
    """
    runs = [run for group in groups for run in group.runs.values()]
    if asked is not None:
        names = dict.fromkeys(name for run in runs for name in metric_names(run.records))
        if asked not in names:
            raise UserError(f"--metric {asked}: no run has it; choose from {', '.join(names) or 'none'}")
        return asked
    first = next((metric for run in runs if (metric := primary_metric(run.records)) is not None), None)
    kept = {name for group in groups for each in group.predictions.values() for name in each.columns}
    return first if first in kept else next((name for name in BY_ITEMS if name in kept), first)


def seeds_text(groups: Sequence[Group]) -> str:
    """Return the table of means over seeds; empty where no method has two."""
    if all(len(group.runs) < 2 for group in groups):
        return ""
    runs = [run for group in groups for run in group.runs.values()]
    metrics = list(dict.fromkeys(name for run in runs for name in metric_names(run.records)))
    body = [_mean_row(group, metrics) for group in groups]
    return table(["runs", "seeds", *metrics, "total", "epsilon"], body) + "\n\nMean ± standard error over the seeds."


def _mean_row(group: Group, metrics: Sequence[str]) -> list[object]:
    runs = list(group.runs.values())
    final = [metrics_of(run.records, run.summary) for run in runs]
    epsilon = largest_epsilon(group)
    return [
        group.label,
        len(runs),
        *(mean_text([row[name] for row in final if name in row]) for name in metrics),
        human_bytes(statistics.fmean(totals(run.records)["payload_total"] for run in runs)),
        "–" if epsilon is None else bound(epsilon),
    ]


def largest_epsilon(group: Group) -> float | None:
    """Return the largest epsilon that a run of a group claims; None where one claims none that is finite."""
    epsilons = [found["max"] for run in group.runs.values() if (found := (run.summary or {}).get("epsilon"))]
    return max(epsilons) if epsilons and None not in epsilons else None


def mean_text(values: Sequence[float]) -> str:
    """Write a mean with its standard error; none is known of a single value."""
    if not values or any(map(math.isnan, values)):
        return "–"
    error = standard_error(values)
    return number(values[0]) if error is None else f"{number(statistics.fmean(values))} ± {number(error)}"


def differences_text(rows: Sequence[Compared], metric: str) -> str:
    """Return the table of paired differences, the chance level, and how they were made."""
    references = list(dict.fromkeys(row.reference.label for row in rows if row.reference is not None))
    several = len(references) > 1
    head = ["method", "seeds", metric, *(["reference"] if several else []), "difference"]
    shown = table(head, [_difference_row(row, metric, several) for row in rows])
    level = next((value for row in rows if not math.isnan(value := chance(row.group, metric))), math.nan)
    lead = "" if math.isnan(level) else f"Who knows nothing scores {number(level)}."
    against = references[0] if len(references) == 1 else "its reference"
    said = PAIRED.format(metric=metric, reference=against, items=_items(rows), draws=DRAWS) + (SHARED_ITEMS if _share(rows) else "")
    return "\n\n".join(filter(None, [lead, shown, said if any(row.difference for row in rows) else ""]))


def _share(rows: Sequence[Compared]) -> bool:
    """Tell whether seeds were measured on the same items."""
    found = [[kept.items for kept in row.group.predictions.values()] for row in rows]
    return any(len(set(items)) < len(items) for items in found)


def _items(rows: Sequence[Compared]) -> str:
    """Tell how many items a test part has."""
    found = {len(column) for row in rows for kept in row.group.predictions.values() for column in kept.columns.values()}
    return " or ".join(f"{count:,}" for count in sorted(found))


def _difference_row(row: Compared, metric: str, several: bool) -> list[object]:
    reference = [row.reference.label if row.reference else "–"] if several else []
    shown = "(the reference)" if row.group is row.reference else f"not paired: {row.why}"
    if row.difference is not None:
        fewer = row.difference.seeds < len(row.group.runs)
        shown = difference_text(row.difference) + (f" of {plural(row.difference.seeds, 'seed')} in common" if fewer else "")
    return [row.group.label, len(row.group.runs), mean_text(row.group.finals(metric)), *reference, shown]


def difference_text(found: Difference) -> str:
    """Write a difference with its interval; in bold where that leaves zero out and there is more than one seed."""
    if math.isnan(found.value):
        return "–"
    low, high = (f"{value:+.3f}" for value in found.interval)
    text = f"{found.value:+.3f} [{low}, {high}]"
    return f"**{text}**" if found.stands_out else text


def until_text(groups: Sequence[Group], metric: str, target: float, *, chosen: bool) -> str:
    """Return the table of bytes to equal quality; ``chosen`` tells whether nobody asked for this target."""
    body = [[group.label, *_reach_row(group, metric, target)] for group in groups]
    why = ", the worst of the federated methods' final means" if chosen else ""
    said = UNTIL.format(metric=metric, target=number(target), why=why)
    return f"{said}\n\n{table(['method', 'round', 'bytes until then', 'of these one-off', 'runs'], body)}"


def _reach_row(group: Group, metric: str, target: float) -> list[object]:
    if group.by_clients:
        return ["measured by its clients", "–", "–", "–"]
    found = reach(group, metric, target)
    runs, point = f"{found.runs} of {found.of}", found.point
    return ["never", "–", "–", runs] if point is None else [point.round, human_bytes(point.bytes), human_bytes(point.one_off), runs]
