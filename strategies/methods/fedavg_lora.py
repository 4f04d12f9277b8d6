"""FedAvg-LoRA, also known as FedIT (Zhang et al. 2023, arXiv:2305.05644): average A, average B.

Cheap and not exact: the product of the means misses ``Σ w_i (B_i − B̄)(A_i − Ā)``, which the exactness gap measures each round.
"""

from __future__ import annotations

from strategies.base import LowRankStrategy
from strategies.reducers import MeanReducer, Reducer


class FedAvgLoRA(LowRankStrategy):
    """Average A, B and the head."""

    sums_uploads = True

    def new_reducer(self) -> Reducer:
        """Return the mean of all trained tensors."""
        return MeanReducer(self.decode)
