"""What charts and tables of a page are made of: the groups of a comparison, and a number for each run, by which figures name them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from fedsb.report.comparing import Comparison
from fedsb.report.groups import Group, grouped
from fedsb.report.series import UNDRAWN, metric_names, primary_metric

T = TypeVar("T")
UNFINISHED = " (not finished)"
MOST_NUMBERS = 60_000  # of all lines of a page: some 500 kB
A_ROUND = 16  # numbers of a group that a round adds to them
FEWEST, MOST = 12, 400  # points of a line


@dataclass(frozen=True)
class View:
    """Runs over the same data as a page shows them.

    Attributes:
        comparison: of them.
        numbers: of all runs of the page, by folder.
        groups: of the comparison, and behind them runs that have not finished, by method and settings.
        most: points that a line may have.
    """

    comparison: Comparison
    numbers: Mapping[Path, int]
    groups: Sequence[Group]
    most: int = MOST

    @cached_property
    def metric(self) -> str | None:
        """By which metric methods are shown: that of the comparison, else of runs that have not finished."""
        return self.comparison.metric or next(filter(None, (primary_metric(run.records) for run in self.comparison.runs)), None)

    @cached_property
    def metrics(self) -> list[str]:
        """All metrics that are drawn, the one that methods are shown by first."""
        names = dict.fromkeys(name for run in self.comparison.runs for name in metric_names(run.records) if name not in UNDRAWN)
        return sorted(names, key=lambda name: name != self.metric)

    def runs_of(self, group: Group) -> list[int]:
        """Return the numbers of a group's runs."""
        return [self.numbers[run.path] for run in group.runs.values()]


def views_of(parts: Sequence[Comparison]) -> list[View]:
    """Return what a page shows of comparisons, a view for each, with one number for each run of all."""
    numbers = {path: number for number, path in enumerate(dict.fromkeys(run.path for part in parts for run in part.runs), 1)}
    groups = [_groups(part) for part in parts]
    most = points_a_line(sum(map(len, groups)))
    return [View(part, numbers, found, most) for part, found in zip(parts, groups, strict=True)]


def _groups(part: Comparison) -> list[Group]:
    if all(run.summary is not None for run in part.runs):
        return part.groups
    return [*part.groups, *(replace(group, label=group.label + UNFINISHED) for group in grouped(part.runs, finished=False))]


def points_a_line(groups: int) -> int:
    """Return how many points a line may have, for so many groups on a page."""
    return max(FEWEST, min(MOST, MOST_NUMBERS // (A_ROUND * max(1, groups))))


def thinned(points: Sequence[T], most: int) -> list[T]:
    """Return points spread evenly over those given, first and last among them; all where they are few."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def ranges_text(numbers: Iterable[int]) -> str:
    """Write numbers with those that follow one another drawn together: ``1–3, 7``."""
    ordered = sorted(set(numbers))
    runs = [[number for _, number in found] for _, found in groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def short(value: float | None) -> float | None:
    """Return a number to six digits, as none can be seen of more; None for what is no finite number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")
