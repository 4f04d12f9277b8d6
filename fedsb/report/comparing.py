"""What a comparison is made of, found once: the Markdown and the page show the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from fedsb.core.errors import UserError
from fedsb.report.datasets import by_data
from fedsb.report.groups import Group, grouped
from fedsb.report.methods import Asked, metric_of
from fedsb.report.pairing import Compared, against_reference
from fedsb.report.sanity import Table, remarks
from fedsb.report.series import metric_names
from fedsb.report.until import usual_target
from fedsb.run.folder import Run


@dataclass(frozen=True)
class Comparison:
    """Runs over the same data, and what is asked of them.

    Attributes:
        runs: all of them, finished or not.
        asked: what they are to show.
        data: name of their data.
    """

    runs: Sequence[Run]
    asked: Asked = field(default_factory=Asked)
    data: str = ""

    @cached_property
    def groups(self) -> list[Group]:
        """The finished runs by method and settings."""
        return grouped(self.runs)

    @cached_property
    def metric(self) -> str | None:
        """By which metric methods are compared; None where nothing was measured.

        Raises:
            UserError: no run has the one that is asked for.
        """
        return metric_of(self.groups, self.asked.metric)

    @cached_property
    def rows(self) -> list[Compared]:
        """Every group beside its reference; none where there is one group alone, or no metric.

        Raises:
            UserError: no run is of the reference that is asked for, or none can be paired with it.
        """
        if len(self.groups) < 2 or self.metric is None:
            return []
        return against_reference(self.groups, self.metric, self.asked.against)

    @cached_property
    def target(self) -> float | None:
        """Value of the metric that bytes are counted to."""
        if self.asked.target is not None or self.metric is None:
            return self.asked.target
        return usual_target(self.groups, self.metric)

    @cached_property
    def remarks(self) -> list[str]:
        """What makes the table of methods doubtful, a line each."""
        return [] if len(self.groups) < 2 or self.metric is None else remarks(Table(self.groups, self.metric, self.asked.tuned))


def comparisons(runs: Sequence[Run], asked: Asked) -> list[Comparison]:
    """Return the comparisons of runs, one for each of the data that they are over.

    Raises:
        UserError: no run is of what is asked for.
    """
    parts = by_data(runs)
    if len(parts) == 1:
        return [Comparison(runs, asked, name) for name in parts]
    return [Comparison(found, _fitting(found, runs, asked), name) for name, found in parts.items()]


def _fitting(part: Sequence[Run], runs: Sequence[Run], asked: Asked) -> Asked:
    """Leave out what is asked of other data alone: nobody is asked for a method that a part lacks, as long as another part has it.

    Raises:
        UserError: no part has it.
    """
    metrics = {name for run in part for name in metric_names(run.records)}
    if asked.metric is not None and asked.metric not in metrics:
        metric_of(grouped(runs), asked.metric)
        asked = replace(asked, metric=None, target=None)
    names = {name for group in grouped(part) for name in (group.label, group.method)}
    if asked.against is not None and asked.against not in names:
        everywhere = [label for name, found in by_data(runs).items() for group in grouped(found) for label in (group.label, group.method)]
        if asked.against not in everywhere:
            raise UserError(f"--against {asked.against}: no finished run is of it; choose from {', '.join(dict.fromkeys(everywhere))}")
        asked = replace(asked, against=None)
    return asked
