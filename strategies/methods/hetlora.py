"""HetLoRA (Cho et al. 2024, arXiv:2401.06432): clients of several ranks; the mean of their zero-padded factors, weighted by their norms.

``B̄ = Σ p_i [B_i 0]``, ``Ā = Σ p_i [A_i; 0]`` with ``p_i = ‖B_i A_i‖_F / Σ_j ‖B_j A_j‖_F``, a client's norm over all modules (the paper's
sparsity-weighted aggregation: numbers of examples take no part in it). A client is sent the leading block of its rank. Where no upload has
a product, what was sent stays. So does what none of a round's clients holds: else zeros would take its place, in B and in A alike, and
nothing there could ever learn again. The head is the mean by the run's weights.

Self-pruning, where ``prune`` gives γ: a client of rank r trains with the penalty ``λ Σ ‖B[:, ⌊γ r⌋:]‖ ‖A[⌊γ r⌋:]‖`` (``train.tail_penalty``
is λ), and if that sum over modules is smaller after its training than it was before, it goes on with rank ⌊γ r⌋. The server decides it, who
has both before and after: the client is told its rank. What a run is foretold to cost is a bound then.

Not exact: products of means are no means of products, padding shrinks what few clients hold, and the weights are not the run's. The
exactness gap measures all of it. All share one scale s = alpha / r, with r the server's rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.adapters.low_rank import low_rank_squared_norm
from fedsb.adapters.tails import kept_rank, tail_norm
from fedsb.core.blocks import embedded
from fedsb.core.state import HEAD, Name, State, WeightedSum
from strategies.base import LowRankStrategy
from strategies.options import number
from strategies.reducers import Aggregate, Reducer


class NormWeighted:
    """The mean of zero-padded factors by the norms of their products, and of the head by the weights that are given.

    Memory is that of one upload at the server's rank.

    Args:
        spec: the adapter family, of the factors B and A.
    """

    def __init__(self, spec: AdapterSpec) -> None:
        self._spec = spec
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` has the server's rank."""
        self._current = current
        self._factors, self._head = WeightedSum(), WeightedSum()
        self._held: dict[Name, tuple[int, ...]] = {}  # leading blocks: the largest holds all others
        self._largest = 0.0

    def add(self, upload: State, weight: float) -> None:
        """Take one upload, of any rank."""
        if len(head := upload.pick(HEAD)):
            self._head.add(head, weight)
        pairs = [self._spec.split(tuple(upload[Name(module, role)] for role in self._spec.factors)) for module in upload.modules]
        norm = math.sqrt(sum(low_rank_squared_norm([pair]) for pair in pairs))
        factors = upload.pick(*self._spec.factors)
        self._factors.add(State({name: embedded(t, self._current[name], self._spec.block, name.role) for name, t in factors.items()}), norm)
        self._largest = max(self._largest, norm)
        for name, t in factors.items():
            self._held[name] = max(self._held.get(name, (0, 0)), tuple(t.shape))

    def finish(self) -> Aggregate:
        """Return the means; ``extras`` hold the largest p_i (``largest_share``)."""
        head = self._head.mean() if self._head.total_weight else State()
        total = self._factors.total_weight
        mean = self._factors.mean() if total else self._current.pick(*self._spec.factors)
        made = State({name: self._kept(name, t) for name, t in mean.items()})
        return Aggregate(head.merge(made), extras={"largest_share": self._largest / total if total else 0.0})

    def _kept(self, name: Name, mean: Tensor) -> Tensor:
        """Return a factor with what nobody holds of it as it was sent."""
        whole = self._current[name].to("cpu", torch.float64, copy=True)
        place = self._spec.block(name.role, self._held[name])
        whole[place] = mean[place].double()
        return whole


class HetLoRA(LowRankStrategy):
    """Average zero-padded factors by the norms of their products; average the head.

    Args:
        prune: γ, the share of its rank that a client keeps when it prunes itself; None: no client does.
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: there is no such share.
    """

    any_rank = True

    def __init__(self, *, prune: float | None = None, **options: Any) -> None:
        super().__init__(**options)
        if prune is not None:
            said = f"method.options.prune={prune} must be a share of the rank between 0 and 1, or null"
            number(prune, lambda value: 0 < value < 1, said)
        self._prune = prune

    @property
    def spends_less(self) -> bool:
        """Whether clients may prune themselves."""
        return self._prune is not None

    def lower_rank(self, upload: State, sent: State) -> int | None:
        """Return the rank without its tail where the tail has lost weight in the client's training."""
        if self._prune is None or not tail_norm(upload, self._prune) < tail_norm(sent, self._prune):
            return None
        return kept_rank(min(t.shape[0] for name, t in upload.items() if name.role == "A"), self._prune)

    def over_uploads(self) -> Reducer:
        """Return the mean by norms."""
        return NormWeighted(self.spec)
