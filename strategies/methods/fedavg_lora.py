"""FedAvg-LoRA, also known as FedIT (Zhang et al. 2023, arXiv:2305.05644): average A, average B.

Cheap and not exact: the product of the means misses ``Σ w_i (B_i − B̄)(A_i − Ā)``, which the exactness gap measures each round.
"""

from strategies.base import LowRankStrategy


class FedAvgLoRA(LowRankStrategy):
    """Average A, B and the head."""
