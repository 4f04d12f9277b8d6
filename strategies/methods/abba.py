"""ABBA (Singhal et al. 2025, arXiv:2505.14238) by FedAvg: the mean of each of the four factors.

Not exact: the product of the means misses cross terms of orders two to four, as the exactness gap tells.
"""

from strategies.base import LowRankStrategy


class ABBA(LowRankStrategy):
    """Average B1, A1, B2, A2 and the head."""
