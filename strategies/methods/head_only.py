"""Head only: the body stays as it was loaded, and averaging the head is exact."""

from strategies.base import LowRankStrategy


class HeadOnly(LowRankStrategy):
    """Average the head."""
