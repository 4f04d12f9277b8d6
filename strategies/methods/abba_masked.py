"""ABBA with a first pair that rests: FedEx-LoRA's residual of the second pair, under the mask ``M = B1 A1``, makes it exact.

``M ∘ (Σ w_i B2_i A2_i − B̄2 Ā2)`` is ``M ∘ (U V)`` with FedEx's factors of the second pair, of rank (k − 1) r2. These are what is sent:
the mask is at every client already (:mod:`fedsb.adapters.masked`).
"""

from __future__ import annotations

from collections.abc import Sequence

from strategies.base import LowRankStrategy
from strategies.methods.fedex_lora import FedExReducer
from strategies.reducers import Reducer

SECOND = ("B2", "A2")


class ABBAMasked(LowRankStrategy):
    """Average B2, A2 and the head; append the residual, which is masked at the clients, to the frozen log."""

    is_exact = True

    @property
    def _coarse(self) -> bool:
        return self.wire_dtype != "float32"

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return FedEx's rank of the second pair."""
        _, r2 = self.spec.shape("B2", 1, 1, ranks[0])
        return r2 * (len(ranks) - 1 + 2 * self._coarse)

    def over_uploads(self) -> Reducer:
        """Return the means with their residual."""
        return FedExReducer(self.scale, self.decode, coarse=self._coarse, cohort=len(self.round_clients), pair=SECOND)
