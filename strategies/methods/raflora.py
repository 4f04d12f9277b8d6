"""raFLoRA (Wu et al. 2026, arXiv:2602.13486): FlexLoRA's rule, with component j of the mean product averaged over those who hold it.

``ΔW = Σ_j Σ_{i: r_i ≥ j} (w_i / W_j) B_i[:, j] A_i[j]`` with ``W_j = Σ_{i: r_i ≥ j} w_i``. FlexLoRA divides each component by the
weights of all: what few hold loses the share of the others in every round, until the least rank alone is left (the paper's rank collapse).
Where all have one rank, the server's, it is FlexLoRA to the bit.

What nobody of a round holds stays as it was sent, where FlexLoRA loses it (a reading: the paper's own way with it is not known here). Not
exact: the gap is that from the mean by the run's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsb.core.state import Name, State
from strategies.decomposing import Decomposing, Kept
from strategies.methods.flexlora import FlexLoRA


class Banded(Decomposing):
    """The mean of the head, and the decomposed sum of the components' means; for the arguments see :class:`Decomposing`."""

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` has the server's rank."""
        super().begin(current)
        self._weights: list[float] = []
        self._held: dict[str, list[int]] = {}  # the uploads' ranks, by module

    def add(self, upload: State, weight: float) -> None:
        """Take one upload, of any rank."""
        super().add(upload, weight)
        self._weights.append(weight)
        for module in upload.modules:
            self._held.setdefault(module, []).append(len(upload[Name(module, "A")]))

    def _handed_out(self, module: str, left: Tensor, right: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        ranks = self._held[module]
        widest, total = max(ranks), sum(self._weights)
        holding = [sum(w for w, rank in zip(self._weights, ranks, strict=True) if rank > j) for j in range(widest)]
        raised = torch.tensor([total / holding[j] for rank in ranks for j in range(rank)], device=right.device)
        stays = self._current[Name(module, "B")][:, widest:].to(left), before[widest:].to(right)
        wide = torch.cat([left, stays[0]], dim=1), torch.cat([raised[:, None] * right, stays[1]])
        return super()._handed_out(module, *wide, before, kept)


class RaFLoRA(FlexLoRA):
    """Decompose the sum of the components' means; average the head. For the arguments see :class:`FlexLoRA`."""

    rule = Banded
