"""FLoRA (Wang et al. 2024, arXiv:2409.05976): the clients' factors are stacked, which is exact, and their product goes into the weights.

``Σ w_i s B_i A_i = [B_1 … B_k] [s w_1 A_1; …; s w_k A_k]``: the stack of rank k r is what every client is sent of a round, and its own
factors begin anew. The published code averages the head beside; so does this.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedsb.adapters import AdapterSpec
from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.products import Stacks
from strategies.reducers import Aggregate, Reducer


class Stacking:
    """The stack of all uploads, and the mean of the head.

    Args:
        spec: the adapter family.
        scale: s.
    """

    def __init__(self, spec: AdapterSpec, scale: float) -> None:
        self._spec = spec
        self._scale = scale
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round's uploads."""
        self._stacks = Stacks(self._spec, self._scale)

    def add(self, upload: State, weight: float) -> None:
        """Take one upload."""
        self._stacks.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean head, and ``U`` and ``V`` of each module."""
        added = {Name(module, role): t for module in self._stacks.modules for role, t in zip("UV", self._stacks.take(module), strict=True)}
        return Aggregate(self._stacks.head(), State(added))


class FLoRA(LowRankStrategy):
    """Stack the factors into the frozen weights; average the head."""

    is_exact = True
    any_rank = True

    def over_uploads(self) -> Reducer:
        """Return the stack."""
        return Stacking(self.spec, self.scale)

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return the sum of the clients' ranks."""
        return sum(ranks)
