"""Nested Fed-SB: a client of rank r_i holds ``B_i = B[:, :r_i]`` and ``A_i = A[:r_i]``, and trains the leading r_i x r_i block of R.

Entry by entry the server takes the mean over H(a, b) = {i in the round: r_i > max(a, b)}, those who hold the entry, by their weights:

``R'[a, b] = Σ_{i in H} w_i R_i[a, b] / Σ_{i in H} w_i``, and ``R'[a, b] = R[a, b]`` where H is empty.

With the ranks ρ_1 < … < ρ_k of a round, ``M_j`` the mask of block ρ_j without block ρ_{j−1}, and ``W_j`` the weight of those who
hold block ρ_j,

``s B R' A = Σ_j 1/W_j Σ_{i: r_i >= ρ_j} w_i s B (M_j ∘ R_i) A`` plus what of R nobody held: in each ring between two ranks, what every
client holds next is the mean of the products of those who trained it.

It is not the mean of the clients' weights, ``Σ w_i s B_i R_i A_i``, for an entry is not divided by the weight of those who do not hold it;
the exactness gap, which every method is measured by, says so. Nor is it the mean of whole weights. To have that, each client's core is to
be filled from the server's R with what it does not hold, ``R̃_i``, and ``B (Σ w_i R̃_i) A = Σ w_i B R̃_i A``: an entry that few hold moves
by their small share of all weights only, and here as far as they moved it. The two are one where all have one rank (both are Fed-SB then);
how far they lie apart is in each round's record (``lifted_gap``).

The leading columns of B and rows of A should be the ones that matter most, as the starts by an SVD sort them: a leading block is the best
of its rank then. All share one scale s = alpha / r, with r the server's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from fedsb.adapters.low_rank import low_rank_squared_norm
from fedsb.core.blocks import Block, BlockMean
from fedsb.core.state import HEAD, Name, State, WeightedSum
from strategies.base import LowRankStrategy
from strategies.reducers import Aggregate, Reducer

Norm = Callable[[State], float]


class MeanOfHolders:
    """The mean of every entry over those who hold it, and of the head over all.

    Args:
        block: where a smaller core lies in the server's.
        norm: of the weight that a core makes.
    """

    def __init__(self, block: Block, norm: Norm) -> None:
        self._block = block
        self._norm = norm
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` has the server's rank."""
        self._current = current
        self._mean = BlockMean(self._block)
        self._lifted = WeightedSum()
        self._nested = False

    def add(self, upload: State, weight: float) -> None:
        """Take one upload, of any rank."""
        self._mean.add(upload, weight)
        self._lifted.add(State({name: self._lift(name, t) for name, t in upload.items() if name.role != HEAD}), weight)

    def finish(self) -> Aggregate:
        """Return the means; ``extras`` hold ``lifted_gap`` where a client had a smaller rank than the server.

        That is ``‖s B (R' − Σ w_i R̃_i) A‖_F / ‖s B (Σ w_i R̃_i) A‖_F`` over all modules.
        """
        mean = self._mean.mean(self._current)
        if not self._nested:
            return Aggregate(mean)
        lifted = self._lifted.mean()
        apart, whole = self._norm(State({name: mean[name] - t for name, t in lifted.items()})), self._norm(lifted)
        return Aggregate(mean, extras={"lifted_gap": apart / whole if whole else 0.0})

    def _lift(self, name: Name, part: Tensor) -> Tensor:
        whole = self._current[name]
        if part.shape == whole.shape:
            return part
        self._nested = True
        filled = whole.clone()
        filled[self._block(name.role, tuple(part.shape))] = part
        return filled


class NestedFedSB(LowRankStrategy):
    """Average each entry of R over those who hold it, and the head over all.

    Privacy of whole clients is refused, as for every rule over the uploads: the sum of an entry is divided by the weights of those who
    answered and hold it, which one client changes, and no noise covers that.
    """

    any_rank = True

    @property
    def is_exact(self) -> bool:
        """Where all clients have one rank, as Fed-SB is; not with several."""
        return len(set(self.participation.ranks.values())) <= 1

    def over_uploads(self) -> Reducer:
        """Return the mean of those who hold an entry."""
        return MeanOfHolders(self.spec.block, self._norm)

    def _norm(self, cores: State) -> float:
        """Return ``‖s B R A‖_F`` over all modules."""
        held = self.frozen.view().basis.merge(cores)
        factors = [tuple(held[Name(module, role)].double() for role in self.spec.factors) for module in cores.modules]
        return self.scale * math.sqrt(sum(low_rank_squared_norm([self.spec.split(each)]) for each in factors))
