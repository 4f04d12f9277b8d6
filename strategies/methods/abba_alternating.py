"""ABBA, one factor a round: its mean is exact, for ΔW is linear in each of the four."""

from strategies.base import LowRankStrategy


class ABBAAlternating(LowRankStrategy):
    """Average the factor whose turn it is, and the head."""
