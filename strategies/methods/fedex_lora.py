"""FedEx-LoRA (Singhal et al. 2024, arXiv:2410.09432): average A and B, and add what the averages miss to the frozen weights.

The residual ``Σ w_i B_i A_i − B̄ Ā = Σ_{i≠j} w_i (B_i − B_j)(A_i − Ā)`` holds for any fixed client j, so it has rank at most
(k − 1) r and is sent as factors; no m x n product is formed. Optionally it is truncated to rank r' (best approximation by
Eckart-Young), and the error of that is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsb.core.errors import UserError
from fedsb.core.state import Name, State, WeightedSum
from fedsb.wire.arrays import INT8
from strategies.base import LowRankStrategy
from strategies.products import truncate
from strategies.reducers import Aggregate, Reducer

HUGE_PAGE = 2**21  # bytes


class FedExReducer:
    """Means of A, B and head, and the residual as factors ``U = [B_i − B_j]``, ``V = [s w_i (A_i − Ā)]``.

    Ā is taken as clients decode it. Rounding it to float32 changes the result below the accuracy of float32; with a coarser
    ``decode`` the exact correction of both means is appended (2 r more ranks). Factors go to their place in U and V
    as they come, and no upload is kept but the first, which is client j. U and V are the factors of every upload of the round, so that its
    memory is O(clients), where that of a mean is one upload's.

    Args:
        scale: s.
        decode: rounds a state to what clients decode from the wire.
        coarse: whether ``decode`` rounds below float32.
        truncate: rank r' of the residual sent; None sends it whole.
        cohort: uploads to expect, to make room for once; others are taken too.
        pair: roles of the two factors, (m, r) and (r, n).
    """

    def __init__(
        self,
        scale: float,
        decode: Callable[[State], State],
        *,
        coarse: bool = False,
        truncate: int | None = None,
        cohort: int = 0,
        pair: tuple[str, str] = ("B", "A"),
    ) -> None:
        self._b, self._a = pair
        self._scale = scale
        self._decode = decode
        self._coarse = coarse
        self._truncate = truncate
        self._cohort = cohort
        self.begin(State())

    def begin(self, current: State) -> None:
        """Forget the last round's uploads."""
        self._sum = WeightedSum()
        self._first: State | None = None
        self._stacks: dict[str, tuple[Tensor, Tensor]] = {}
        self._weights: list[float] = []

    def add(self, upload: State, weight: float) -> None:
        """Add to the means and stack the factors, B as its difference from the first."""
        self._sum.add(upload, weight)
        factors = upload.pick(self._a, self._b)
        if self._first is None:
            self._first = factors
            return
        for module in factors.modules:
            a, b = factors[Name(module, self._a)], factors[Name(module, self._b)]
            left, right = self._room(module, a, b)
            place = slice(len(self._weights) * len(a), (len(self._weights) + 1) * len(a))
            torch.sub(b, self._first[Name(module, self._b)], out=left[:, place])
            right[place] = a
        self._weights.append(weight)

    def _room(self, module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stacks of a module with room for one upload more."""
        rank, used = len(a), len(self._weights)
        if module not in self._stacks:
            self._stacks[module] = torch.empty(len(b), 0), torch.empty(0, a.shape[1])
        left, right = self._stacks[module]
        if len(right) < (used + 1) * rank:
            width = max(self._cohort - 1, 2 * used, 1) * rank + self._extra(rank)
            left, right = _sized(left, len(b), width), _sized(right, width, a.shape[1])
            self._stacks[module] = left, right
        return left, right

    def _extra(self, rank: int) -> int:
        return 2 * rank if self._coarse else 0

    def finish(self) -> Aggregate:
        """Return the means and the residual; the stacks become U and V."""
        mean = self._sum.mean()
        state = mean.merge(self._decode(mean.pick(self._a, self._b)))  # the head is decoded like everybody's, outside
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
        assert self._first is not None
        a, b = Name(module, self._a), Name(module, self._b)
        first, rank, count = self._first[b], len(state[a]), len(self._weights)
        used, width = count * rank, count * rank + self._extra(rank)
        left, right = self._stacks.pop(module, (torch.empty(0, 0), torch.empty(0, 0)))
        left, right = _sized(left, len(first), width), _sized(right, width, state[a].shape[1])
        for slot, weight in enumerate(self._weights):
            right[slot * rank : (slot + 1) * rank].sub_(state[a]).mul_(self._scale * weight / self._sum.total_weight)
        if width > used:
            # Σ w B A − B̄' Ā' = Σ w (B_i − B_j)(A_i − Ā') + B_j (Ā − Ā') + (B̄ − B̄') Ā' for rounded means B̄', Ā'.
            left[:, used:] = torch.cat([first.double(), mean[b] - state[b]], dim=1)
            right[used:] = self._scale * torch.cat([mean[a] - state[a], state[a].double()])
        return left, right


def _sized(stack: Tensor, *shape: int) -> Tensor:
    """Return a stack of the given shape that holds what of ``stack`` it has room for: the stack itself where it fits already."""
    if stack.shape == shape:
        return stack
    rows, columns = map(min, stack.shape, shape)
    sized = _fresh(*shape)
    sized[:rows, :columns] = stack[:rows, :columns]
    return sized


def _fresh(rows: int, columns: int) -> Tensor:
    """Return memory for a matrix in float32; a large one from a border of huge pages on.

    NumPy asks the system for huge pages; with small ones, fresh memory would cost more time than all that is computed in it.
    """
    size = rows * columns
    spare = HUGE_PAGE if 4 * size >= 2 * HUGE_PAGE else 0
    flat = np.empty(size + spare // 4, np.float32)
    start = -flat.ctypes.data % spare // 4 if spare else 0
    return torch.from_numpy(flat[start : start + size]).view(rows, columns)


class FedExLoRA(LowRankStrategy):
    """Average A, B and the head; append the residual to the frozen log.

    Args:
        truncate: rank r' of the residual; None keeps it exact.
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: ``truncate`` is no rank.
    """

    def __init__(self, *, truncate: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if truncate is not None and (not isinstance(truncate, int) or isinstance(truncate, bool) or truncate < 1):
            raise UserError(f"method.options.truncate={truncate} must be a rank of at least 1, or null for the whole residual")
        self._truncate = truncate
        self._coarse = self.wire_dtype != "float32"
        self._hold_what_int8_takes()

    def _hold_what_int8_takes(self) -> None:
        """Refuse a truncation to less than the ranks that make up for the means' rounding."""
        ranks = [shape[0] for name, shape in self.layouts.up[0].shapes if name.role == "A"]
        least = 2 * max(ranks, default=0)
        if self._truncate is not None and self.wire_dtype == INT8 and self._truncate < least:
            raise UserError(
                f"method.options.truncate={self._truncate} with federation.wire_dtype=int8: what makes up for the rounding of both means "
                f"has rank {least} by itself, and little or nothing of the clients' residual would be left; use {least} or more, null for "
                "the whole residual, or federation.wire_dtype=bfloat16"
            )

    @property
    def is_exact(self) -> bool:
        """Whether the residual is sent whole."""
        return self._truncate is None

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return (k − 1) r, 2 r more on a coarse wire, or the truncation where it is smaller."""
        whole = sum(ranks[1:]) + (2 * ranks[0] if self._coarse else 0)
        return whole if self._truncate is None else min(whole, self._truncate)

    def over_uploads(self) -> Reducer:
        """Return the means with their residual."""
        return FedExReducer(self.scale, self.decode, coarse=self._coarse, truncate=self._truncate, cohort=len(self.round_clients))
