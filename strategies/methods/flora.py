"""FLoRA (Wang et al. 2024, arXiv:2409.05976): the clients' factors are stacked, which is exact, and their product goes into the weights.

``Σ w_i s B_i A_i = [B_1 … B_k] [s w_1 A_1; …; s w_k A_k]``: the stack of rank k r is what every client is sent of a round, and its own
factors begin anew. The published code averages the head beside; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsb.core.state import HEAD, Name, State, WeightedSum
from strategies.base import LowRankStrategy
from strategies.reducers import Aggregate, Reducer


class Stacking:
    """The stack of all uploads, and the mean of the head.

    Args:
        scale: s.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round's uploads."""
        self._head = WeightedSum()
        self._uploads: list[tuple[State, float]] = []

    def add(self, upload: State, weight: float) -> None:
        """Keep the factors of an upload, and add its head to the mean."""
        head = upload.pick(HEAD)
        if len(head):
            self._head.add(head, weight)
        self._uploads.append((upload, weight))

    def finish(self) -> Aggregate:
        """Return the mean head, and ``U`` and ``V`` of each module."""
        total = sum(weight for _, weight in self._uploads)
        first, _ = self._uploads[0]
        added: dict[Name, torch.Tensor] = {}
        for module in first.modules:
            a, b = Name(module, "A"), Name(module, "B")
            added[Name(module, "U")] = torch.cat([upload[b] for upload, _ in self._uploads], dim=1)
            added[Name(module, "V")] = torch.cat([self._scale * weight / total * upload[a] for upload, weight in self._uploads])
        return Aggregate(self._head.mean() if len(first.pick(HEAD)) else State(), State(added))


class FLoRA(LowRankStrategy):
    """Stack the factors into the frozen weights; average the head."""

    is_exact = True
    any_rank = True

    def over_uploads(self) -> Reducer:
        """Return the stack."""
        return Stacking(self.scale)

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return the sum of the clients' ranks."""
        return sum(ranks)
