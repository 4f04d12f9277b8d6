"""RoLoRA (Chen et al. 2024, arXiv:2409.02346): B and A learn in turns, so that the mean of the one that learns is exact."""

from strategies.base import LowRankStrategy


class RoLoRA(LowRankStrategy):
    """Average the factor whose turn it is, and the head."""
