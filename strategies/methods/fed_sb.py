"""Fed-SB (Singhal et al. 2025, arXiv:2502.15436): B and A frozen and shared, the mean of the r x r cores R is exact.

``B (Σ w_i R_i) A = Σ w_i B R_i A``, so the message is r² values a module whatever m, n and the number of clients. Exact for the
parameters, not for the path of a local optimiser that takes several steps.
"""

from strategies.base import LowRankStrategy


class FedSB(LowRankStrategy):
    """Average R (and the head)."""
