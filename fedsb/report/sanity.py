"""What makes a table of methods doubtful, said beside it: the rules that published comparisons break."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedsb.report.groups import Group
from fedsb.report.pairing import compared
from fedsb.report.series import LOWER_IS_BETTER
from fedsb.report.table import number, plural

CHANCES = {"exact_match": "chance", "accuracy_norm": "choice_chance", "accuracy": "choice_chance"}
BASE, POOLED = "untouched", "centralized"
SURE = 2.0  # standard errors
MANY = 10  # differences


@dataclass(frozen=True)
class Table:
    """What is looked at.

    Attributes:
        groups: that are compared.
        metric: by which.
        tuned: how the rates were chosen, in words; None where that was not told.
    """

    groups: Sequence[Group]
    metric: str
    tuned: str | None = None

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, else -1."""
        return -1 if self.metric in LOWER_IS_BETTER else 1

    @property
    def measured(self) -> list[Group]:
        """The groups that have the metric."""
        return [group for group in self.groups if group.finals(self.metric)]

    def of(self, method: str) -> Group | None:
        """Return the group of a baseline, where there is one and no more."""
        found = [group for group in self.groups if group.method == method]
        return found[0] if len(found) == 1 else None


def chance(group: Group, metric: str) -> float:
    """Return the score of who knows nothing: as a group's runs say, else of who always names the commonest class; NaN where unknown."""
    if told := group.finals(CHANCES.get(metric, "")):
        return statistics.fmean(told)
    truths = [kept.columns["truth"] for kept in group.predictions.values() if metric == "accuracy" and "truth" in kept.columns]
    return statistics.fmean(float(np.bincount(truth).max() / len(truth)) for truth in truths) if truths else math.nan


def _no_number(table: Table) -> Iterator[str]:
    for group in table.measured:
        if lost := sum(map(math.isnan, group.finals(table.metric))):
            yield f"{group.label}: {table.metric} is no number in {lost} of {plural(len(group.runs), 'run')}, so that it has no mean."


def _below_chance(table: Table) -> Iterator[str]:
    for group in table.measured:
        mean, level = group.mean(table.metric), chance(group, table.metric)
        if group.method == BASE or not mean < level:
            continue
        if failures := group.finals("parse_failures"):
            lost = f"answers may not be parsed (parse failures {number(statistics.fmean(failures))})"
        else:
            lost = "it has learnt less than to name the commonest class"
        yield f"{group.label}: {table.metric} {number(mean)} is below the chance level {number(level)}: {lost}."


def _like_the_base(table: Table) -> Iterator[str]:
    base = table.of(BASE)
    if base is None:
        yield "No untouched base is among these runs, so that nothing tells what training was worth: add method=untouched."
        return
    for each in compared([(group, base) for group in table.groups if group.method != BASE], table.metric):
        if each.difference is not None and not math.isnan(each.difference.value) and not each.difference.is_clear:
            low, high = map(number, each.difference.interval)
            differs = f"{table.metric} differs by [{low}, {high}]"
            yield f"{each.group.label} equals the untouched base within noise ({differs}): its adapters may not move."


def _better_than_pooled(table: Table) -> Iterator[str]:
    pooled = table.of(POOLED)
    if pooled is None:
        return
    for each in compared([(group, pooled) for group in table.groups if group is not pooled], table.metric):
        if each.difference is not None and table.sign * each.difference.value > SURE * each.difference.error:
            gain = number(abs(each.difference.value))
            better = f"is better than pooled data by {gain}, more than {SURE:g} standard errors"
            yield f"{each.group.label} {better}: check for leakage, or tune both."


def _one_seed(table: Table) -> Iterator[str]:
    single = [group.label for group in table.groups if len(group.runs) == 1]
    if single:
        whose = "every method" if len(single) == len(table.groups) else ", ".join(single)
        yield f"One seed alone of {whose}: intervals are over test items, and say nothing of split, draw and start; nothing is in bold."


def _rates(table: Table) -> Iterator[str]:
    if table.tuned:
        yield f"Rates: tuned, {table.tuned}."
        return
    given = [group.label for group in table.groups if group.first.setting("train.lr") != group.first.setting("method.lr")]
    set_here = f"set by hand for {', '.join(given)}, else as shipped" if given else "as shipped"
    yield f"Rates: {set_here}; none is known to be tuned, and a method may gain by another one (--tuned says how they were chosen)."


def _residuals(table: Table) -> Iterator[str]:
    for group in table.groups:
        records = [record for run in group.runs.values() for record in run.records]
        if ranks := [record.extras["residual_rank"] for record in records if "residual_rank" in record.extras]:
            counted = f"travels, and is counted, as factors of rank up to {max(ranks):.0f}"
            yield f"{group.label}: its residual {counted}; published tables count it as dense matrices."


def _many(table: Table) -> Iterator[str]:
    count = len(table.groups) - 1
    if count >= MANY:
        by_chance = f"some {count / 20:.1f} leave zero out by chance where nothing differs"
        yield f"Of {count} intervals at 95% {by_chance}: one difference is no finding."


RULES: tuple[Callable[[Table], Iterator[str]], ...] = (
    _no_number,
    _below_chance,
    _like_the_base,
    _better_than_pooled,
    _one_seed,
    _many,
    _rates,
    _residuals,
)


def remarks(table: Table) -> list[str]:
    """Return what is to be said, a line each."""
    return [line for rule in RULES for line in rule(table)]
