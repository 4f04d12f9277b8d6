"""What it takes to reach one quality: rounds and bytes, those of the start included."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsb.report.groups import Group
from fedsb.report.intervals import standard_error
from fedsb.report.series import LOWER_IS_BETTER, PAYLOADS, cumulative
from fedsb.run.folder import Run

ROUNDING = 1e-9


@dataclass(frozen=True)
class Point:
    """A round of a method, means over its seeds.

    Attributes:
        round: after which it was measured.
        bytes: moved until then, summed over clients, of the start and of all rounds.
        one_off: what of them is moved once.
        value: of the metric.
        error: its standard error; None of a single seed.
    """

    round: int
    bytes: float
    one_off: float
    value: float
    error: float | None = None


@dataclass(frozen=True)
class Reach:
    """How a method comes to a target: where its mean does, None where it never does; and in how many of its runs of their own."""

    point: Point | None
    runs: int
    of: int


def usual_target(groups: Sequence[Group], metric: str) -> float | None:
    """Return the worst of the groups' final means, which all of them reach; None where none has the metric.

    Only federations count, which the server measures: the untouched base is no target.
    """
    means = [mean for group in groups if group.moves and not group.by_clients and not math.isnan(mean := group.mean(metric))]
    return (max if metric in LOWER_IS_BETTER else min)(means) if means else None


def mean_curve(runs: Sequence[Run], metric: str) -> list[Point]:
    """Return the rounds that all runs have measured, in order."""
    curves = [_curve(run, metric) for run in runs]
    shared = [number for number in curves[0] if all(number in curve for curve in curves)]
    return [_mean([curve[number] for curve in curves]) for number in shared]


def reach(group: Group, metric: str, target: float) -> Reach:
    """Return how a group comes to a target: in the first round in which it was measured to be there."""
    runs = list(group.runs.values())
    alone = [_first(mean_curve([run], metric), metric, target) for run in runs]
    return Reach(_first(mean_curve(runs, metric), metric, target), sum(point is not None for point in alone), len(runs))


def _first(curve: Sequence[Point], metric: str, target: float) -> Point | None:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    return next((point for point in curve if sign * (point.value - target) >= -ROUNDING * abs(target)), None)


def _curve(run: Run, metric: str) -> Mapping[int, Point]:
    counts, once = cumulative(run.records, *PAYLOADS), cumulative(run.records, "payload_one_off")
    points = [Point(r.round, c, o, r.metrics[metric]) for r, c, o in zip(run.records, counts, once, strict=True) if metric in r.metrics]
    return {point.round: point for point in points}


def _mean(points: Sequence[Point]) -> Point:
    mean = {name: statistics.fmean(getattr(point, name) for point in points) for name in ("bytes", "one_off", "value")}
    return Point(points[0].round, **mean, error=standard_error([point.value for point in points]))
