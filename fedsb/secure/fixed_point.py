"""Values of a weighted sum as whole numbers modulo 2^32.

A client's value x, cut to ``[−b, b]``, becomes ``q = round(w x s)`` with its weight w ≤ 1 and ``s = (2^31 − 1 − k) / b``, where k is the
number of summands. The weights sum to at most one, so that ``|Σ q| ≤ Σ (w b s + 1/2) ≤ 2^31 − 1 − k + k/2 < 2^31``: the sum cannot wrap
around, whatever the clients send, and the masks' arithmetic modulo 2^32 gives it back exactly. What is lost is the rounding: at most
``k / (2 s)`` of the weighted sum in each value, and ``sqrt(k / 12) / s`` in the root of the mean of squares.

One word more counts the values that were cut, so that none is cut silently. Nobody sees but the sum how many there were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsb.secure.masks import WORD, Words

COUNTS = 1  # words beside the values
_HALF = 2**31


@dataclass(frozen=True)
class FixedPoint:
    """The scale of a sum.

    Attributes:
        bound: b, the largest absolute value.
        summands: k, the largest number of clients in the sum.
    """

    bound: float
    summands: int

    @property
    def scale(self) -> float:
        """Units of the sum in 1."""
        return (_HALF - 1 - self.summands) / self.bound

    def encode(self, values: np.ndarray[Any, Any], weight: float) -> Words:
        """Return the words of a client's values, and behind them how many were beyond the bound.

        Args:
            values: flat, finite.
            weight: the client's, in [0, 1]; those of a sum are at most 1 together.
        """
        assert 0 <= weight <= 1
        assert np.isfinite(values).all()
        wide = values.astype(np.float64)
        beyond = int(np.count_nonzero(np.abs(wide) > self.bound))
        units = np.rint(np.clip(wide, -self.bound, self.bound) * (weight * self.scale)).astype(np.int64)
        # As many as would wrap around are never said: the sum of the counts is below 2^32 too.
        return np.concatenate([units, [min(beyond, (2**32 - 1) // self.summands)]]).astype(np.uint32)

    def decode(self, words: Words, weight: float) -> tuple[np.ndarray[Any, np.dtype[np.float64]], int]:
        """Return the weighted mean of what was summed, in float64, and how many values were cut.

        Args:
            words: the sum without masks.
            weight: the sum of the weights, above 0.
        """
        return words[:-COUNTS].view(np.int32) / (self.scale * weight), int(words[-1])

    def worst(self, summed: int, weight: float) -> float:
        """Return by how much rounding can move a value of the mean of so many summands with so much weight together."""
        return summed / 2 / (self.scale * weight)

    def expected(self, summed: int, weight: float) -> float:
        """Return the root of the mean of squares of what rounding moves a value of that mean by."""
        return math.sqrt(summed / 12) / (self.scale * weight)


def coded_words(values: int) -> int:
    """Return how many words so many values take."""
    return values + COUNTS


def coded_bytes(values: int) -> int:
    """Return how many bytes so many values take, masked or not."""
    return WORD * coded_words(values)
