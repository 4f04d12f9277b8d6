"""FedSVD (Lee et al. 2025, arXiv:2505.12805): the mean of B is exact while A rests; then ``B A = P S Qᵀ``, and ``B ← P S``, ``A ← Qᵀ``.

The product stays what it was, of rank r at most. The decomposition is the server's, of what was averaged or noised already, and takes no
part of any budget.
"""

from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.products import truncate
from strategies.reducers import Aggregate


class FedSVD(LowRankStrategy):
    """Average B and the head; turn the product into one with an orthonormal A."""

    is_exact = True
    anew = ("B",)

    def follow(self, mean: State, held: State) -> Aggregate:
        """Return the head as it is, and B and A decomposed anew."""
        found = dict(mean.items())
        for b, left in mean.pick("B").items():
            a = Name(b.module, "A")
            found[b], found[a], _, _ = truncate(left, held[a], left.shape[1])
        return Aggregate(State(found))
