"""FlexLoRA (Bai et al. 2024, arXiv:2402.11505): clients of several ranks; the mean of their products is decomposed anew in each round.

``ΔW = Σ w_i B_i A_i = P S Qᵀ``; a client of rank r_i is sent ``B = P S`` and ``A = Qᵀ`` cut to r_i, its best approximation of that rank.
HLoRA (arXiv:2503.00813) is the same rule. All share one scale s = alpha / r with r the server's rank, so that a factor means the same to
everyone. What lies beyond the server's rank is lost, as the exactness gap tells; what lies beyond a client's is not sent to it and, where
all of a round's clients have such ranks, is lost with that round, as ``cut_error`` tells.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fedsb.adapters.redrawn import Redrawn
from fedsb.wire.arrays import INT8
from strategies.base import LowRankStrategy
from strategies.decomposing import Cut, Decomposing
from strategies.reducers import Reducer


class FlexLoRA(LowRankStrategy):
    """Decompose the mean of the products; average the head.

    Args:
        energy: τ, the share of a product's energy to keep by a smaller rank a module; None keeps the server's rank.
        split: ``left`` (``B = P S``, ``A = Qᵀ``), ``balanced`` (``B = P √S``, ``A = √S Qᵀ``) or ``right`` (``B = P``, ``A = S Qᵀ``).
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: there is no such share, or no such split.
    """

    rule: ClassVar[type[Decomposing]] = Decomposing
    any_rank = True
    anew = ("B", "A")

    def __init__(self, *, energy: float | None = None, split: str = "left", **options: Any) -> None:
        super().__init__(**options)
        self._cut = Cut(energy, split)

    def over_uploads(self) -> Reducer:
        """Return the decomposition."""
        return self.rule(self.spec, tuple(self.participation.ranks.values()), self._cut, self._redrawn())

    @property
    def redraws(self) -> bool:
        """Whether what lies beyond the kept rank is drawn, and need not be sent."""
        # What an int8 wire makes of a value depends on its neighbours, and the server must know what clients hold: there all travels.
        return self._cut.energy is not None and self.wire_dtype != INT8

    def _redrawn(self) -> Redrawn | None:
        assert self._round is not None
        return Redrawn(self.participation.seed, self._round.number) if self.redraws else None
