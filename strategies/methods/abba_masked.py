"""ABBA with a first pair that rests: FedEx-LoRA's residual of the second pair, under the mask ``M = B1 A1``, makes it exact.

``M ∘ (Σ w_i B2_i A2_i − B̄2 Ā2)`` is ``M ∘ (U V)`` with FedEx's factors of the second pair, and so the product of Khatri-Rao factors of
rank r1 (k − 1) r2. They are sent as such, or as a matrix where that is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedsb.adapters.khatri_rao import columns, rows
from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.methods.fedex_lora import FedExReducer
from strategies.reducers import Aggregate, Reducer

Decode = Callable[[State], State]


class Masked(FedExReducer):
    """FedEx's means and residual of B2 and A2, the residual under a mask.

    Args:
        held: with the B1 and A1 of every module.
        scale: s.
        decode: rounds a state to what clients decode from the wire.
        coarse: whether ``decode`` rounds below float32.
        cohort: uploads to expect.
    """

    def __init__(self, held: State, scale: float, decode: Decode, *, coarse: bool, cohort: int) -> None:
        self._held = held
        super().__init__(scale, decode, coarse=coarse, cohort=cohort, pair=("B2", "A2"))

    def finish(self) -> Aggregate:
        """Return the means, and U and V of each module."""
        found = super().finish()
        masked = {}
        for name, t in found.log.items():
            of, mask = (columns, "B1") if name.role == "U" else (rows, "A1")
            masked[name] = of(self._held[Name(name.module, mask)], t)
        extras = {**found.extras, "residual_rank": float(max((t.shape[1] for n, t in masked.items() if n.role == "U"), default=0))}
        return Aggregate(found.state, State(masked), extras)


class ABBAMasked(LowRankStrategy):
    """Average B2, A2 and the head; append the masked residual to the frozen log."""

    is_exact = True

    @property
    def _coarse(self) -> bool:
        return self.wire_dtype != "float32"

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return r1 times FedEx's rank of the second pair."""
        shapes = self.spec.shapes(1, 1, ranks[0])
        (_, r1), (_, r2) = shapes["B1"], shapes["B2"]
        return r1 * r2 * (len(ranks) - 1 + 2 * self._coarse)

    def over_uploads(self) -> Reducer:
        """Return the means with their masked residual."""
        return Masked(self._sent, self.scale, self.decode, coarse=self._coarse, cohort=len(self.round_clients))
