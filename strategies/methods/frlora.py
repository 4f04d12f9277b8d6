"""FRLoRA (ICLR 2025, OpenReview e0rQRMUhs7): every round begins at one pair, and what a round has moved goes into the frozen weights.

``W ← W + s (B̄ Ā − B0 A0)``, with s B0 A0 the leading part of W0, which is taken out of it at the start. Clients thus always train around
the same principal directions. The means are not exact, as the exactness gap tells, but their errors lie in the weights and not in a start.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.reducers import Aggregate


class FRLoRA(LowRankStrategy):
    """Average A, B and the head; append what the product of the means has moved, and hand the first pair out again."""

    def follow(self, mean: State, held: State) -> Aggregate:
        """Return the pair that was held, the mean head, and ``U = [B̄ − B0, B0]``, ``V = s [Ā; Ā − A0]`` of each module.

        ``[B̄, −B0] [Ā; A0]`` would be the difference of two parts of W0 as large as it, and what moved lost in their rounding.
        """
        added = {}
        for b, left in mean.pick("B").items():
            a = Name(b.module, "A")
            b0, a0 = held[b].double(), held[a].double()
            added[Name(b.module, "U")] = torch.cat([left - b0, b0], dim=1).float()
            added[Name(b.module, "V")] = (self.scale * torch.cat([mean[a], mean[a] - a0])).float()
        again = State({name: held[name] for name in mean if name.role in ("A", "B")})
        return Aggregate(mean.merge(again), State(added))

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return 2 r."""
        return 2 * ranks[0]
