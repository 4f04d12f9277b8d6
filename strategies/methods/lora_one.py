"""LoRA-One (Zhang, Liu and Chen 2025, arXiv:2502.01235) in a federation: LoRA from one step down the clients' mean gradient.

The mean gradient's SVD comes out of the clients' sketch, and its pair goes to all of them once, with the first state; then factors are
averaged, which is not exact, as the exactness gap tells. Any other rule over LoRA's factors starts so with ``init.kind=gradient``.
"""

from strategies.base import LowRankStrategy


class LoRAOne(LowRankStrategy):
    """Average A, B and the head."""
