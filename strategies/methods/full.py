"""FedAvg of all weights (McMahan et al. 2017, arXiv:1602.05629), without adapters: what low rank saves, and what it gives up."""

from strategies.base import LowRankStrategy


class FullFineTuning(LowRankStrategy):
    """Average every parameter."""
