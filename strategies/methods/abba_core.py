"""Fed-SB's rule in ABBA's geometry: the mean of the cores between frozen Khatri-Rao factors is exact."""

from strategies.base import LowRankStrategy


class ABBACore(LowRankStrategy):
    """Average R and the head."""
