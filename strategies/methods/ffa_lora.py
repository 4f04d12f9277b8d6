"""FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): A is drawn once and frozen, the mean of B is exact."""

from strategies.base import LowRankStrategy


class FFALoRA(LowRankStrategy):
    """Average B and the head."""
