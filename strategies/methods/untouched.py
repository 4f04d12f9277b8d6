"""The base as it came, measured and not trained: what every gain is a gain over."""

from strategies.base import LowRankStrategy


class Untouched(LowRankStrategy):
    """Ask nobody."""
