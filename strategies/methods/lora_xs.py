"""LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604) in a federation: Fed-SB's rule between factors that nobody sends.

``B (Σ w_i R_i) A = Σ w_i B R_i A`` where B and A are the same at all clients. Each computes them from W0, and is held against the server:
see :mod:`fedsb.core.prints`.
"""

from strategies.base import LowRankStrategy


class LoRAXS(LowRankStrategy):
    """Average R (and the head)."""
