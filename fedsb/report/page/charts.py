"""The charts of a page, in one table: each makes of a view what the page's script draws, or None where the runs have nothing for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsb.report.budgets import mean_bytes
from fedsb.report.clients import client_spread
from fedsb.report.drawing import LOG_SPREAD, ratio
from fedsb.report.groups import Group
from fedsb.report.intervals import standard_error
from fedsb.report.labels import run_labels
from fedsb.report.methods import largest_epsilon
from fedsb.report.page.view import View, ranges_text, short, thinned
from fedsb.report.plots import EXACT, SMALLEST_GAP, WAYS
from fedsb.report.series import LOWER_IS_BETTER, total_or_none
from fedsb.report.until import Point, mean_curve
from fedsb.run.records import SHARED

Spec = dict[str, Any]
MOST_DOTS = 60  # clients of a group that are drawn
GAPS = "The largest over the seeds of each round's exactness gap; a rule that is exact stays below 1e-5, which float32 rounding alone is."
SPREAD = "A dot a client and seed, on what each client holds out; of more than {most} of them as many, from the worst to the best."
BYTES = "Payload so far, summed over clients: of the start and of all rounds, or without what is delivered once. Mean over the seeds."
QUALITY = "Mean over the seeds with its standard error; round 0 is before training."
PAIRED = "Each minus {reference}, by seed and test item, with its interval at 95%; filled where it leaves zero out over several seeds."
EPSILON = (
    "The last value, mean over the seeds with its standard error, against the largest epsilon that a run of the group claims. "
    "A line joins groups that differ in their noise alone."
)
COST = "What a run takes, mean over the seeds: payload summed over clients, or seconds of all rounds together."


@dataclass(frozen=True)
class Chart:
    """A chart: what it is called, what stands below it, and what makes its data.

    Attributes:
        title: with ``{metric}`` for the metric of the page.
        caption: what is drawn, and how it was made.
        make: returns kind, axes and variants, each with a label and a row a group (``g``, its place); ``beside`` are the numbers of further
            runs that it is from.
        measured: whether it shows the metric of whole models, which some methods' clients measure.
    """

    title: str
    caption: str
    make: Callable[[View], Spec | None]
    measured: bool = False


def charts(view: View) -> list[Spec]:
    """Return what is drawn of a view, each chart with the runs that it is from."""
    found = []
    for key, chart in CHARTS.items():
        made = chart.make(view)
        if made is None:
            continue
        drawn = {row["g"] for variant in made["variants"] for row in variant["rows"]}
        runs = ranges_text([*made.pop("beside", ()), *(number for g in drawn for number in view.runs_of(view.groups[g]))])
        caption = f"{made.pop('caption', chart.caption)}{_own(view, drawn) if chart.measured else ''} From runs {runs}."
        found.append({"key": key, "title": _titled(chart.title.format(metric=view.metric)), "caption": caption, **made})
    return found


def _own(view: View, drawn: Collection[int]) -> str:
    """Say whose values are those of clients on their own parts, where others are of the test part."""
    own = [view.groups[g].label for g in sorted(drawn) if view.groups[g].by_clients]
    return (
        f" Not to be held against the others: {', '.join(own)}, measured by clients, each on its own part."
        if 0 < len(own) < len(drawn)
        else ""
    )


def _titled(text: str) -> str:
    return text[:1].upper() + text[1:]


def _axis(title: str, unit: str = "number", *, log: bool = False) -> Spec:
    return {"title": title, "unit": unit, "log": log}


def _lines(view: View, metric: str, along: Callable[[Point], float]) -> list[Spec]:
    """Return a line a group that the server measures, or its clients do: a metric against what a point is drawn along."""
    rows = []
    for g, group in enumerate(view.groups):
        points = [point for point in mean_curve(list(group.runs.values()), metric) if math.isfinite(point.value)]
        points = thinned(points, view.most)
        if points:
            shown = {"x": [short(along(p)) for p in points], "y": [short(p.value) for p in points], "r": [p.round for p in points]}
            errors = [short(p.error) for p in points]
            rows.append({"g": g, **shown, **({"e": errors} if any(error is not None for error in errors) else {})})
    return rows


def _quality(view: View) -> Spec | None:
    variants = [
        {"label": name, "y": _axis(name), "rows": rows} for name in view.metrics if (rows := _lines(view, name, lambda point: point.round))
    ]
    return {"kind": "lines", "x": _axis("round", "round"), "variants": variants} if variants else None


def _against_bytes(view: View) -> Spec | None:
    if view.metric is None:
        return None
    ways: Mapping[str, Callable[[Point], float]] = {
        "with the one-off": lambda point: point.bytes,
        "without the one-off": lambda point: point.bytes - point.one_off,
    }
    variants = [_moved(label, _lines(view, view.metric, along)) for label, along in ways.items()]
    return {"kind": "lines", "y": _axis(view.metric), "variants": variants} if any(each["rows"] for each in variants) else None


def _moved(label: str, rows: Iterable[Spec]) -> Spec:
    """Leave out who moves nothing and, on a logarithmic axis, points before anything has moved."""
    moving = [row for row in rows if any(row["x"])]
    log = ratio([x for row in moving for x in row["x"]]) > LOG_SPREAD
    kept = []
    for row in moving:
        places = [i for i, x in enumerate(row["x"]) if x or not log]
        kept.append({key: value if key == "g" else [value[i] for i in places] for key, value in row.items()})
    return {"label": label, "x": _axis("payload so far, summed over clients", "bytes", log=log), "rows": kept}


def _differences(view: View) -> Spec | None:
    place = {id(group): g for g, group in enumerate(view.groups)}
    rows = [
        {"g": place[id(row.group)], "v": short(found.value), "i": [short(end) for end in found.interval], "clear": found.stands_out}
        for row in view.comparison.rows
        if (found := row.difference) is not None and all(map(math.isfinite, (found.value, *found.interval)))
    ]
    if not rows:
        return None
    references = {row.reference.label: row.reference for row in view.comparison.rows if row.reference}
    against = next(iter(references)) if len(references) == 1 else "its reference"
    beside = [number for group in references.values() for number in view.runs_of(group)]
    better = "left" if view.metric in LOWER_IS_BETTER else "right"
    axis = _axis(f"difference; {better} of 0 is better")
    return {
        "kind": "ranges",
        "x": axis,
        "caption": PAIRED.format(reference=against),
        "beside": beside,
        "variants": [{"label": "", "rows": rows}],
    }


def _against_epsilon(view: View) -> Spec | None:
    if view.metric is None:
        return None
    rows: list[Spec] = []
    for g, group in enumerate(view.groups):
        values, epsilon = group.finals(view.metric), largest_epsilon(group)
        if values and epsilon is not None and math.isfinite(group.mean(view.metric)):
            error = short(standard_error(values))
            told = {} if error is None else {"e": [error]}
            rows.append({"g": g, "x": [short(epsilon)], "y": [short(statistics.fmean(values))], **told})
    if not rows:
        return None
    log = ratio([row["x"][0] for row in rows]) > LOG_SPREAD
    axes = {"x": _axis("epsilon", log=log), "y": _axis(view.metric)}
    return {"kind": "lines", **axes, "links": _by_epsilon(view, rows), "variants": [{"label": "", "rows": rows}]}


def _by_epsilon(view: View, rows: Sequence[Spec]) -> list[Spec]:
    """Return groups that differ in their noise alone, by epsilon, and what they are called together, so that a line joins them."""
    names = run_labels([view.groups[row["g"]].first for row in rows], without=("seed", "privacy.epsilon", "privacy.noise_multiplier"))
    alike: dict[str, list[int]] = {}
    for row in sorted(range(len(rows)), key=lambda i: rows[i]["x"][0]):
        alike.setdefault(names[row], []).append(rows[row]["g"])
    return [{"name": name, "of": found} for name, found in alike.items() if len(found) > 1]


def _gaps(view: View) -> Spec | None:
    rows = []
    for g, group in enumerate(view.groups):
        by_round: dict[int, list[float]] = {}
        for run in group.runs.values():
            for record in run.records:
                if record.exactness_gap is not None and math.isfinite(record.exactness_gap):
                    by_round.setdefault(record.round, []).append(record.exactness_gap)
        points = thinned(sorted((number, max(gaps)) for number, gaps in by_round.items()), view.most)
        if points:
            rows.append({"g": g, "x": [x for x, _ in points], "y": [short(max(y, SMALLEST_GAP)) for _, y in points]})
    axes = {"x": _axis("round", "round"), "y": _axis("relative distance to the true mean", log=True)}
    level = {"value": EXACT, "text": "exact below 1e-5"}
    return {"kind": "lines", **axes, "level": level, "variants": [{"label": "", "rows": rows}]} if rows else None


def _spread(view: View) -> Spec | None:
    if view.metric is None:
        return None
    kinds = {view.metric: "the clients' models", f"{SHARED}{view.metric}": "what is shared of them"}
    variants = [{"label": label, "rows": rows} for name, label in kinds.items() if (rows := _dots(view, name))]
    axis = _axis(f"{view.metric} on a client's own part")
    return {"kind": "dots", "x": axis, "caption": SPREAD.format(most=MOST_DOTS), "variants": variants} if variants else None


def _dots(view: View, name: str) -> list[Spec]:
    rows = []
    for g, group in enumerate(view.groups):
        found = [
            (row[name], f"{client}, run {view.numbers[run.path]}")
            for run in group.runs.values()
            for client, row in next((each.client_metrics for each in reversed(run.records) if each.client_metrics), {}).items()
            if name in row and math.isfinite(row[name])
        ]
        shown = thinned(sorted(found), MOST_DOTS)
        if shown:
            mean = statistics.fmean(client_spread(run.records)[name]["mean"] for run in group.runs.values() if _has(run.records, name))
            rows.append({"g": g, "x": [short(x) for x, _ in shown], "names": [said for _, said in shown], "mean": short(mean)})
    return rows


def _has(records: Sequence[Any], name: str) -> bool:
    return name in client_spread(records)


def _cost(view: View) -> Spec | None:
    moved: list[Spec] = [{"g": g, "values": [short(mean_bytes(group, key)) for key in WAYS]} for g, group in enumerate(view.groups)]
    took: list[Spec] = [{"g": g, "values": _seconds(group)} for g, group in enumerate(view.groups)]
    everything = [value for row in moved for value in row["values"]]
    axes = _axis("bytes", "bytes", log=ratio(everything) > LOG_SPREAD), _axis("seconds", "seconds")
    made: list[Spec] = [
        {"label": "bytes", "names": list(WAYS.values()), "x": axes[0], "rows": [row for row in moved if any(row["values"])]},
        {
            "label": "time",
            "names": ["wall clock", "CPU of the server's process"],
            "x": axes[1],
            "rows": [r for r in took if any(r["values"])],
        },
    ]
    variants = [each for each in made if each["rows"]]
    return {"kind": "bars", "variants": variants} if variants else None


def _seconds(group: Group) -> list[float | None]:
    """Return wall clock and CPU seconds of a run, means over the seeds; None where one run does not tell."""
    found = []
    for kind in ("wall_s", "cpu_s"):
        sums = [total_or_none([getattr(record, kind) for record in run.records]) for run in group.runs.values()]
        found.append(short(statistics.fmean(told)) if len(told := [each for each in sums if each is not None]) == len(sums) else None)
    return found


CHARTS: Mapping[str, Chart] = {
    "quality": Chart("Quality by round", QUALITY, _quality, measured=True),
    "bytes": Chart("{metric} against bytes", BYTES, _against_bytes, measured=True),
    "differences": Chart("{metric}: paired differences", PAIRED, _differences),
    "epsilon": Chart("{metric} against epsilon", EPSILON, _against_epsilon, measured=True),
    "gap": Chart("Exactness gap by round", GAPS, _gaps),
    "clients": Chart("{metric} over clients", SPREAD, _spread),
    "cost": Chart("Cost", COST, _cost),
}
