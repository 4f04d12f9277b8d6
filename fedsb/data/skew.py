"""How unlike the clients of a partition are: their sizes, their shares of each label, and one figure for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsb.data.examples import Examples
from fedsb.data.grouping import Grouping


@dataclass(frozen=True)
class Skew:
    """A partition in figures.

    Attributes:
        sizes: examples by client.
        shares: share of each label among a client's examples, by client; empty where the task has no classes.
        labels: names of the classes, in the order of the shares.
        by: what else the examples are dealt by: ``length``, ``cluster``, ``quantity``; nothing where labels or chance deal them.
        group_shares: share of each group of that kind among a client's examples, by client.
        groups: names of the groups, in the order of these shares.
    """

    sizes: Mapping[str, int]
    shares: Mapping[str, tuple[float, ...]]
    labels: tuple[str, ...]
    by: str = ""
    group_shares: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    @property
    def figure(self) -> float | None:
        """Mean distance, over examples, of a client's label shares from those of all clients together, in total variation.

        0: all clients are alike; towards 1: each has labels of its own. Half of the distance that Zhao et al. 2018 (arXiv:1806.00582)
        explain the loss of accuracy by. None where the task has no classes.
        """
        return self._distance(self.shares)

    @property
    def group_figure(self) -> float | None:
        """The same of the groups; None where there are none."""
        return self._distance(self.group_shares)

    @property
    def size_figure(self) -> float:
        """Total variation between the clients' shares of all examples and equal ones."""
        sizes = np.array(list(self.sizes.values()), dtype=float)
        return float(np.abs(sizes / sizes.sum() - 1 / len(sizes)).sum() / 2)

    def _distance(self, of: Mapping[str, tuple[float, ...]]) -> float | None:
        if not of:
            return None
        weights = np.array([self.sizes[client] for client in of], dtype=float)
        shares = np.array(list(of.values()))
        weights /= weights.sum()
        return float(weights @ np.abs(shares - weights @ shares).sum(axis=1) / 2)

    def line(self) -> str:
        """Return the partition in one line."""
        sizes = sorted(self.sizes.values())
        many = f"{len(sizes)} clients hold {sum(sizes):,} training examples, {sizes[0]:,} to {sizes[-1]:,} each"
        said = [] if self.figure is None else [f"label skew {self.figure:.2f} (0: all alike, 1: each its own labels)"]
        if self.group_figure is not None:
            said.append(f"{self.by} skew {self.group_figure:.2f} over {len(self.groups)} groups (0: all alike, 1: each its own)")
        if self.by == "quantity":
            said.append(f"size skew {self.size_figure:.2f} (0: all of one size, 1: one has all)")
        return "; ".join([many, *said])

    def as_dict(self) -> dict[str, object]:
        """Return it as ``summary.json`` has it."""
        labelled = {
            "label_skew": self.figure,
            "labels": list(self.labels),
            "sizes": dict(self.sizes),
            "label_shares": _rounded(self.shares),
        }
        grouped = {"dealt_by": self.by or None, "group_skew": self.group_figure, "groups": list(self.groups)}
        return {**labelled, **grouped, "group_shares": _rounded(self.group_shares), "size_skew": self.size_figure}


def _rounded(shares: Mapping[str, tuple[float, ...]]) -> dict[str, list[float]]:
    return {client: [round(share, 6) for share in row] for client, row in shares.items()}


def skew_of(
    train: Examples, parts: Mapping[str, Sequence[int]], labels: Sequence[str], *, by: str = "", grouping: Grouping | None = None
) -> Skew:
    """Describe a partition.

    Args:
        train: the training part.
        parts: indices of ``train`` by client, none empty.
        labels: names of the classes; empty where the task has none.
        by: what else the examples were dealt by.
        grouping: the groups, where that was by groups.
    """
    classed = bool(labels) and train.targets is not None
    shares = _shares(np.array(train.targets, dtype=int), len(labels), parts) if classed else {}
    grouped = _shares(np.array(grouping.of), len(grouping.names), parts) if grouping else {}
    sizes = {client: len(rows) for client, rows in parts.items()}
    return Skew(sizes, shares, tuple(labels) if shares else (), by, grouped, grouping.names if grouping else ())


def _shares(of: NDArray[np.int64], count: int, parts: Mapping[str, Sequence[int]]) -> dict[str, tuple[float, ...]]:
    return {client: tuple((np.bincount(of[list(rows)], minlength=count) / len(rows)).tolist()) for client, rows in parts.items()}
