"""How unlike the clients of a partition are: their sizes, their shares of each label, and one figure for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedsb.data.examples import Examples


@dataclass(frozen=True)
class Skew:
    """A partition in figures.

    Attributes:
        sizes: examples by client.
        shares: share of each label among a client's examples, by client; empty where the task has no classes.
        labels: names of the classes, in the order of the shares.
    """

    sizes: Mapping[str, int]
    shares: Mapping[str, tuple[float, ...]]
    labels: tuple[str, ...]

    @property
    def figure(self) -> float | None:
        """Mean distance, over examples, of a client's label shares from those of all clients together, in total variation.

        0: all clients are alike; towards 1: each has labels of its own. Half of the distance that Zhao et al. 2018 (arXiv:1806.00582)
        explain the loss of accuracy by. None where the task has no classes.
        """
        if not self.shares:
            return None
        weights = np.array([self.sizes[client] for client in self.shares], dtype=float)
        shares = np.array(list(self.shares.values()))
        weights /= weights.sum()
        return float(weights @ np.abs(shares - weights @ shares).sum(axis=1) / 2)

    def line(self) -> str:
        """Return the partition in one line."""
        sizes = sorted(self.sizes.values())
        many = f"{len(sizes)} clients hold {sum(sizes):,} training examples, {sizes[0]:,} to {sizes[-1]:,} each"
        if self.figure is None:
            return many
        return f"{many}; label skew {self.figure:.2f} (0: all alike, 1: each its own labels)"

    def as_dict(self) -> dict[str, object]:
        """Return it as ``summary.json`` has it."""
        shares = {client: [round(share, 6) for share in row] for client, row in self.shares.items()}
        return {"label_skew": self.figure, "labels": list(self.labels), "sizes": dict(self.sizes), "label_shares": shares}


def skew_of(train: Examples, parts: Mapping[str, Sequence[int]], labels: Sequence[str]) -> Skew:
    """Describe a partition.

    Args:
        train: the training part.
        parts: indices of ``train`` by client, none empty.
        labels: names of the classes; empty where the task has none.
    """
    shares: dict[str, tuple[float, ...]] = {}
    if labels and train.targets is not None:
        targets = np.array(train.targets, dtype=int)
        shares = {
            client: tuple((np.bincount(targets[list(rows)], minlength=len(labels)) / len(rows)).tolist()) for client, rows in parts.items()
        }
    return Skew({client: len(rows) for client, rows in parts.items()}, shares, tuple(labels) if shares else ())
