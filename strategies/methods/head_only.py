"""Head only: the body stays as it was loaded, and averaging the head is exact."""

from __future__ import annotations

from strategies.base import LowRankStrategy
from strategies.reducers import MeanReducer, Reducer


class HeadOnly(LowRankStrategy):
    """Average the head."""

    sums_uploads = True

    def new_reducer(self) -> Reducer:
        """Return the mean of all trained tensors."""
        return MeanReducer(self.decode)
