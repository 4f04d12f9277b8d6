"""Which runs may be held against each other item by item, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsb.core.errors import UserError
from fedsb.report.groups import Group, reference_of
from fedsb.report.resampling import Difference, Gain, two_level
from fedsb.run.predictions import Predictions

Pair = tuple[Group, Group | None]


class Unpaired(ValueError):
    """Two groups can't be held against each other item by item; says why."""


@dataclass(frozen=True)
class Compared:
    """A group beside what it is held against.

    Attributes:
        group: what is compared.
        reference: what with; None where it is not known.
        difference: the group's metric minus the reference's; None where the two can't be paired, and of a group from itself.
        why: why they can't.
    """

    group: Group
    reference: Group | None
    difference: Difference | None = None
    why: str = ""


def against_reference(groups: Sequence[Group], metric: str, against: str | None = None) -> list[Compared]:
    """Return every group beside its reference.

    Raises:
        UserError: no run is of the reference that is asked for, or none can be paired with it.
    """
    found = compared([(group, reference_of(group, groups, against)) for group in groups], metric)
    others = [each for each in found if each.group is not each.reference]
    if against is not None and others and all(each.difference is None for each in others):
        raise UserError(f"--against {against}: nothing can be paired with it ({others[0].group.label}: {others[0].why})")
    return found


def compared(pairs: Sequence[Pair], metric: str) -> list[Compared]:
    """Return the difference of each group from the other, or why there is none."""
    rows: list[list[Gain] | str] = [_matched(pair, metric) for pair in pairs]
    paired = {i: row for i, row in enumerate(rows) if row and not isinstance(row, str)}
    found = dict(zip(paired, two_level(list(paired.values())), strict=True))
    said = [row if isinstance(row, str) else "" for row in rows]
    return [Compared(*pair, found.get(i), why) for i, (pair, why) in enumerate(zip(pairs, said, strict=True))]


def _matched(pair: Pair, metric: str) -> list[Gain] | str:
    """Return the gains, or in one line why there are none; none of a group over itself."""
    group, other = pair
    if group is other:
        return []
    if other is None:
        return "several could be its reference: name one by --against"
    try:
        return gains(group, other, metric)
    except Unpaired as error:
        return str(error)


def gains(group: Group, other: Group, metric: str) -> list[Gain]:
    """Return what a group gains over another in each seed that both have, item by item.

    Raises:
        Unpaired: they have no seed in common, or were measured on other items, or not item by item.
    """
    for each in (group, other):
        if each.by_clients:
            raise Unpaired(f"{each.method} is measured by its clients, each on its own part")
    seeds = [seed for seed in group.runs if seed in other.runs]
    if not seeds:
        raise Unpaired(f"no seed in common with {other.label}")
    for each in (group, other):
        if any(seed not in each.predictions for seed in seeds):
            raise Unpaired(f"{each.label} has kept no predictions that can be read: run it again")
    return [_gain(seed, group.predictions[seed], other.predictions[seed], metric) for seed in seeds]


def _gain(seed: object, mine: Predictions, theirs: Predictions, metric: str) -> Gain:
    if mine.items != theirs.items:
        raise Unpaired(f"other test items with seed {seed}: give all runs the same data and eval.max_examples")
    try:
        (values, weights), (others, other_weights) = mine.measured(metric), theirs.measured(metric)
    except KeyError:
        raise Unpaired(f"{metric} is no mean over test items") from None
    if not np.array_equal(weights, other_weights):
        raise Unpaired(f"other tokens of the same items count with seed {seed}")
    return Gain(seed, mine.items, values - others, weights)
