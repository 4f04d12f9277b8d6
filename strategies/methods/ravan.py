"""RAVAN (Raje et al. 2025, arXiv:2506.05568): several heads between frozen orthonormal factors that nobody sends; exact.

``Σ_h B_h (Σ_i w_i t_ih H_ih) A_h = Σ_i w_i Σ_h t_ih B_h H_ih A_h``: the message is k r² values a module, of k heads.
"""

from strategies.base import LowRankStrategy


class RAVAN(LowRankStrategy):
    """Average ``t_h H_h`` (and the head of the model)."""
