"""FlexLoRA (Bai et al. 2024, arXiv:2402.11505): clients of several ranks; the mean of their products is decomposed anew in each round.

``ΔW = Σ w_i B_i A_i = P S Qᵀ``; a client of rank r_i is sent ``B = P S`` and ``A = Qᵀ`` cut to r_i, its best approximation of that rank.
All share one scale s = alpha / r with r the server's rank, so that a factor means the same to everyone. What lies beyond the server's rank
is lost, as the exactness gap tells; what lies beyond a client's is not sent to it and, where all of a round's clients have such ranks, is
lost with that round, as ``cut_error`` tells. The mean is a stack of factors, and no (m, n) product is formed.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.products import Stacks, truncate
from strategies.reducers import Aggregate, Reducer


class Decomposing:
    """The mean of the head, and the decomposed mean of the products of all uploads.

    Args:
        spec: the adapter family, of the factors B and A.
        ranks: of the clients, to tell what they are not sent of the mean.
    """

    def __init__(self, spec: AdapterSpec, ranks: Collection[int] = ()) -> None:
        self._spec = spec
        self._ranks = ranks

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` has the server's rank."""
        self._current = current
        self._stacks = Stacks(self._spec)

    def add(self, upload: State, weight: float) -> None:
        """Take one upload, of any rank."""
        self._stacks.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean head, and B and A of each module at the server's rank.

        ``extras`` hold ``truncation_error``, the norm of what lies beyond the server's rank over that of the mean product, and, where
        ``federation.ranks`` gives clients their own, ``cut_error``, the same of what lies beyond a client's, root mean square over all.
        """
        found: dict[Name, Tensor] = {}
        beyond, cut, whole = 0.0, 0.0, 0.0
        for module in self._current.modules:
            a, b = Name(module, "A"), Name(module, "B")
            left, right, lost, total = truncate(*self._stacks.take(module), len(self._current[a]))
            found[b], found[a] = _widened(left, right, self._current[a])
            energies = left.double().square().sum(dim=0)  # the columns of B are orthogonal
            beyond, whole = beyond + lost, whole + total
            cut += sum(lost + float(energies[rank:].sum()) for rank in self._ranks) / max(len(self._ranks), 1)
        errors = {"truncation_error": beyond, **({"cut_error": cut} if self._ranks else {})}
        extras = {name: (error / whole) ** 0.5 if whole else 0.0 for name, error in errors.items()}
        return Aggregate(self._stacks.head().merge(State(found)), extras=extras)


def _widened(b: Tensor, a: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Fill factors up to the rank of ``before``, the last A: columns of B with zeros, beside rows of A that can still learn."""
    missing = len(before) - len(a)
    return torch.cat([b, b.new_zeros(len(b), missing)], dim=1), torch.cat([a, before[len(a) :].to(a)])


class FlexLoRA(LowRankStrategy):
    """Decompose the mean of the products; average the head."""

    any_rank = True

    def over_uploads(self) -> Reducer:
        """Return the decomposition."""
        return Decomposing(self.spec, tuple(self.participation.ranks.values()))
