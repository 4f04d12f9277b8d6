"""FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432): average A and B, and add what the averages miss to the frozen weights.

The residual ``Σ w_i B_i A_i − B̄ Ā = Σ_{i≠j} w_i (B_i − B̄)(A_i − A_j)`` holds for any fixed client j, so it has rank at most
(k − 1) r and is sent as factors; no m x n product is formed. Optionally it is truncated to rank r' (best approximation by
Eckart-Young), and the error of that is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fedsb.errors import UserError
from fedsb.state import Name, State, WeightedSum
from strategies.base import LowRankStrategy
from strategies.reducers import Aggregate, Reducer


class FedExReducer:
    """Means of A, B and head, and the residual as factors ``U = [s w_i (B_i − B̄)]``, ``V = [A_i − A_j]``.

    B̄ is taken as clients decode it. Rounding it to float32 changes the result below the accuracy of float32; with a coarser
    ``decode`` the exact correction of both means is appended (2 r more ranks). The uploads of a round are kept until it ends.

    Args:
        scale: s.
        decode: rounds a state to what clients decode from the wire.
        coarse: whether ``decode`` rounds below float32.
        truncate: rank r' of the residual sent; None sends it whole.
    """

    def __init__(self, scale: float, decode: Callable[[State], State], *, coarse: bool = False, truncate: int | None = None) -> None:
        self._scale = scale
        self._decode = decode
        self._coarse = coarse
        self._truncate = truncate
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round's uploads."""
        self._sum = WeightedSum()
        self._factors: dict[Name, list[Tensor]] = {}
        self._weights: list[float] = []

    def add(self, upload: State, weight: float) -> None:
        """Add to the means and keep the factors."""
        self._sum.add(upload, weight)
        self._weights.append(weight)
        for name, tensor in upload.pick("A", "B").items():
            self._factors.setdefault(name, []).append(tensor)

    def finish(self) -> Aggregate:
        """Return the means and the residual; the kept factors are released on the way."""
        mean = self._sum.mean()
        state = self._decode(mean)
        residual: dict[Name, Tensor] = {}
        error = total = 0.0
        for module in mean.modules:
            left, right = self._residual(module, mean, state)
            if self._truncate is not None and left.shape[1] > self._truncate:
                left, right, lost, whole = truncate(left, right, self._truncate)
                error, total = error + lost, total + whole
            if left.shape[1]:
                residual |= {Name(module, "U"): left, Name(module, "V"): right}
        extras = {"residual_rank": float(max((t.shape[1] for n, t in residual.items() if n.role == "U"), default=0))}
        if self._truncate is not None:
            extras["truncation_error"] = (error / total) ** 0.5 if total else 0.0
        return Aggregate(state, State(residual), extras)

    def _residual(self, module: str, mean: State, state: State) -> tuple[Tensor, Tensor]:
        """Return U (m, ρ) and V (ρ, n) of one module."""
        a, b = Name(module, "A"), Name(module, "B")
        lefts, rights = self._factors.pop(b), self._factors.pop(a)
        heaviest = max(range(len(self._weights)), key=lambda i: (self._weights[i], -i))
        others = [i for i in range(len(self._weights)) if i != heaviest]
        rank, total = state[a].shape[0], sum(self._weights)
        extra = 2 * rank if self._coarse else 0
        left = torch.empty(state[b].shape[0], len(others) * rank + extra)
        for slot, i in enumerate(others):
            torch.sub(lefts[i], state[b], out=left[:, slot * rank : (slot + 1) * rank]).mul_(self._scale * self._weights[i] / total)
        lefts.clear()
        right = torch.empty(len(others) * rank + extra, state[a].shape[1])
        for slot, i in enumerate(others):
            torch.sub(rights[i], rights[heaviest], out=right[slot * rank : (slot + 1) * rank])
        if extra:
            # Σ w B A − B̄' Ā' = Σ w (B_i − B̄')(A_i − A_j) + (B̄ − B̄') A_j + B̄' (Ā − Ā') for rounded means B̄', Ā'.
            left[:, -extra:] = self._scale * torch.cat([mean[b] - state[b], state[b]], dim=1)
            right[-extra:] = torch.cat([rights[heaviest].double(), mean[a] - state[a]])
        return left, right


def truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the best rank-``rank`` factors of ``left @ right``, the squared error and the squared norm of the product.

    QR of both sides and the SVD of a small core; the (m, n) product is not formed.
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept_left = (q_left @ u[:, :rank]) * s[:rank]
    kept_right = vh[:rank] @ q_right.T
    return kept_left.float(), kept_right.float(), float(s[rank:].square().sum()), float(s.square().sum())


class FedExLoRA(LowRankStrategy):
    """Average A, B and the head; append the residual to the frozen log.

    Args:
        truncate: rank r' of the residual; None keeps it exact.
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: a server optimiser is given: it would move A and B away from the means that the residual completes.
    """

    def __init__(self, *, truncate: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if truncate is not None and (not isinstance(truncate, int) or truncate < 1):
            raise UserError(f"method.options.truncate={truncate} must be a rank of at least 1, or null for the whole residual")
        if self.server_optimizer is not None:
            raise UserError(
                "federation.server_optimizer is not defined with method=fedex_lora: its residual completes the plain means of A and B; "
                "use federation.server_optimizer.name=none or another method"
            )
        self._truncate = truncate

    @classmethod
    def residual_rank(cls, cohort: int, rank: int, *, coarse: bool, **options: Any) -> int:
        """Return (k − 1) r, 2 r more on a coarse wire, or the truncation where it is smaller."""
        whole = (cohort - 1) * rank + (2 * rank if coarse else 0)
        limit = options.get("truncate")
        return whole if limit is None else min(whole, int(limit))

    def new_reducer(self) -> Reducer:
        """Return the means with their residual."""
        return FedExReducer(self.scale, self.decode, coarse=self.wire_dtype != "float32", truncate=self._truncate)
