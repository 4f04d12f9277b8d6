"""Runs that differ in their seed alone, taken together: the methods of a comparison."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fedsb.config.settings import FEDERATED
from fedsb.core.errors import UserError
from fedsb.report.clients import by_clients
from fedsb.report.labels import run_labels
from fedsb.report.series import metrics_of, totals
from fedsb.run.folder import Run
from fedsb.run.predictions import Predictions, read_predictions

DEFAULT = "fedavg_lora"  # what most methods of the field are held against


@dataclass(frozen=True)
class Group:
    """A method of a comparison, with the settings that tell it from the others.

    Attributes:
        label: its name, and these settings where there are others of that name.
        settings: that tell it from the others.
        runs: the finished ones, by seed.
    """

    label: str
    settings: str
    runs: Mapping[object, Run]

    @property
    def first(self) -> Run:
        """One of the runs: its settings are those of all, but for the seed."""
        return next(iter(self.runs.values()))

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.first.method

    @property
    def by_clients(self) -> bool:
        """Whether its metrics are measured by the clients, each on its own part."""
        return any(map(by_clients, self.runs.values()))

    @property
    def moves(self) -> bool:
        """Whether it is a federation in which anything travels: not the untouched base, nor pooled data."""
        federated = self.first.setting("method.setting") in (None, FEDERATED)
        return federated and any(totals(run.records)["payload_total"] for run in self.runs.values())

    @cached_property
    def predictions(self) -> Mapping[object, Predictions]:
        """What was kept of each test item, by seed; of runs that kept it, and whose file can be read."""
        found = {seed: _kept(run) for seed, run in self.runs.items()}
        return {seed: kept for seed, kept in found.items() if kept is not None}

    def finals(self, metric: str) -> list[float]:
        """Return the last value of a metric in each run that has it; NaN where a run has diverged, which is no reason to leave it out."""
        last = [metrics_of(run.records, run.summary) for run in self.runs.values()]
        return [row[metric] for row in last if metric in row]

    def mean(self, metric: str) -> float:
        """Return the mean of :meth:`finals`; NaN where there are none, or one of them is."""
        values = self.finals(metric)
        return statistics.fmean(values) if values else math.nan


def _kept(run: Run) -> Predictions | None:
    try:
        return read_predictions(run.path)
    except UserError:
        return None


def grouped(runs: Sequence[Run], *, finished: bool = True) -> list[Group]:
    """Return the finished runs, or those that are not, by method and settings, in the order in which they first appear."""
    found: dict[str, dict[object, Run]] = {}
    for run, label in zip(runs, run_labels(runs, without=("seed",)), strict=True):
        if (run.summary is not None) is finished:
            # Two runs of one seed are one measurement: counted twice they would narrow the error.
            found.setdefault(label, {})[run.setting("seed")] = run
    groups = [
        Group(label, label.partition(" ")[2], dict(sorted(each.items(), key=lambda pair: str(pair[0])))) for label, each in found.items()
    ]
    names = Counter(group.method for group in groups)
    return [replace(group, label=group.method) if names[group.method] == 1 else group for group in groups]


def reference_of(group: Group, groups: Sequence[Group], against: str | None) -> Group | None:
    """Return what a group is held against.

    Of several of the same method it is the one whose other settings are those of the group.

    Args:
        group: of ``groups``.
        groups: all that are compared.
        against: label or method; None for FedAvg of LoRA, or the first where that is not there.

    Returns:
        None where several could be meant.

    Raises:
        UserError: there is no such method among the runs.
    """
    named = [each for each in groups if each.label == against]
    method = against or next((each.method for each in groups if each.method == DEFAULT), groups[0].method)
    found = named or [each for each in groups if each.method == method]
    if not found:
        raise UserError(f"--against {against}: no finished run is of it; choose from {', '.join(each.label for each in groups)}")
    alike = [each for each in found if each.settings == group.settings]
    return found[0] if len(found) == 1 else alike[0] if alike else None
