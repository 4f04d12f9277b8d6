"""Products of two low-rank matrices entry by entry, ``(B1 A1) ∘ (B2 A2)``: ABBA's geometry (Singhal et al. 2025, arXiv:2505.14238).

B1 is (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n), with r1 + r2 the run's rank: as many values as LoRA of that rank, and a product of rank
r1 r2 at most. It is ``Bk Ak`` with the Khatri-Rao products ``Bk[i, a r2 + b] = B1[i, a] B2[i, b]`` (m, r1 r2) and
``Ak[a r2 + b, j] = A1[a, j] A2[b, j]`` (r1 r2, n), so that no (m, n) matrix is needed. It is not ``(B1 A1 x) ∘ (B2 A2 x)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsb.adapters.geometry import Shapes
from fedsb.adapters.spec import Weights
from fedsb.adapters.starts import frames, leading_pair
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State

Start = Callable[[Weights, int, int], State]


def pair_ranks(rank: int, first: int | None) -> tuple[int, int]:
    """Return r1 and r2 of a run's rank: two halves, or what is given and the rest.

    Raises:
        UserError: one of them would be nothing.
    """
    if first is not None and (not isinstance(first, int) or isinstance(first, bool)):
        raise UserError(f"adapter.options.first={first} is no rank; give a whole number, or null for half of the rank")
    given = rank // 2 if first is None else first
    if not 1 <= given < rank:
        said = f"adapter.options.first={first}" if first is not None else "ABBA"
        raise UserError(
            f"rank={rank} with {said}: each of the two pairs needs a rank of at least 1; use rank=2 or more, and first below it"
        )
    return given, rank - given


def pair_shapes(m: int, n: int, rank: int, first: int | None) -> Shapes:
    """Return the shapes of the four factors."""
    r1, r2 = pair_ranks(rank, first)
    return {"B1": (m, r1), "A1": (r1, n), "B2": (m, r2), "A2": (r2, n)}


def columns(left: Tensor, right: Tensor) -> Tensor:
    """Return the row-wise Khatri-Rao product (m, r1 r2) of (m, r1) and (m, r2)."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def rows(upper: Tensor, lower: Tensor) -> Tensor:
    """Return the column-wise Khatri-Rao product (r1 r2, n) of (r1, n) and (r2, n)."""
    return (upper[:, None, :] * lower[None, :, :]).flatten(0, 1)


def split(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Split the product of B1, A1, B2, A2 into ``Bk`` and ``Ak``."""
    b1, a1, b2, a2 = factors
    return columns(b1, b2), rows(a1, a2)


def split_core(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Split ``Bk R Ak`` of B1, B2, R, A1, A2, R (r1 r2, r1 r2) or its diagonal (r1 r2,), into two."""
    b1, b2, core, a1, a2 = factors
    left = columns(b1, b2)
    return (left * core if core.dim() == 1 else left @ core), rows(a1, a2)


class Hadamard(nn.Module):
    """``s``-free forward of the product: by Khatri-Rao factors, (m + n) r1 r2 a token, or by the matrix itself where m n is less.

    Args:
        shapes: of B1, A1, B2, A2.
    """

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.B1, self.A1, self.B2, self.A2 = (nn.Parameter(torch.empty(shapes[role])) for role in ("B1", "A1", "B2", "A2"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        if self.is_matrix:
            return F.linear(x, ((self.B1 @ self.A1) * (self.B2 @ self.A2)).to(x))
        left, right = split((self.B1, self.A1, self.B2, self.A2))
        return F.linear(F.linear(x, right.to(x)), left.to(x))

    @property
    def is_matrix(self) -> bool:
        """Whether the product (m, n) is less to compute with than its factors."""
        return self._of_factors() >= 1

    @property
    def joins(self) -> bool:
        """Whether it is, added to another matrix: a pass and its input's gradient are the other's then, and its own gradient is left."""
        return 3 * self._of_factors() >= 1

    def _of_factors(self) -> float:
        """Return what a token costs by the factors, over what it costs by the matrix."""
        # Clients may hold factors of a rank of their own: what is less is decided anew.
        (m, r1), (r2, n) = self.B1.shape, self.A2.shape
        return (m + n) * r1 * r2 / (m * n)

    def onto(self, weight: Tensor, scale: float) -> Tensor:
        """Return ``weight + s (B1 A1) ∘ (B2 A2)`` (m, n); s goes to B1, the least of what it could go to."""
        return torch.addcmul(weight, (scale * self.B1) @ self.A1, self.B2 @ self.A2)


def svd_start(first: int | None) -> Start:
    """Return ABBA's start: ``B1 = U √S`` and ``A1 = √S Vᵀ`` of W0's leading SVD, B2 zero and A2 uniform in ±√(6/n). W0 stays as it is.

    With both pairs at LoRA's start every gradient would be zero.
    """

    def start(weights: Weights, rank: int, seed: int) -> State:
        tensors: dict[Name, Tensor] = {}
        for module, weight in weights.items():
            tensors |= _svd_pair(module, weight, pair_ranks(rank, first)[0], seed)
            m, n = weight.shape
            shapes = pair_shapes(m, n, rank, first)
            stream = torch_generator(seed, "start", module, "A2")
            tensors[Name(module, "A2")] = nn.init.kaiming_uniform_(torch.empty(shapes["A2"]), a=0.0, generator=stream)
            tensors[Name(module, "B2")] = torch.zeros(shapes["B2"])
        return State(tensors)

    return start


def core_start(first: int | None, diagonal: bool) -> Start:
    """Return a start of ``Bk R Ak``: the first pair from W0's SVD, the second orthonormal, R zero.

    Columns of Bk and rows of Ak have the length 1 on average, as those of Fed-SB's B and A have, so that a rate means the same: the first
    pair is U and Vᵀ without the singular values, the second √m and √n times as long as frames.
    """

    def start(weights: Weights, rank: int, seed: int) -> State:
        r1, r2 = pair_ranks(rank, first)
        tensors: dict[Name, Tensor] = {}
        for module, weight in weights.items():
            m, n = weight.shape
            b, _, a = leading_pair(weight, r1, seed, module)
            tensors |= {Name(module, "B1"): b, Name(module, "A1"): a}
            left, right = frames(m, n, r2, torch_generator(seed, "start", module, "second"))
            tensors |= {Name(module, "B2"): math.sqrt(m) * left, Name(module, "A2"): math.sqrt(n) * right}
            tensors[Name(module, "R")] = torch.zeros((r1 * r2,) if diagonal else (r1 * r2, r1 * r2))
        return State(tensors)

    return start


def _svd_pair(module: str, weight: Tensor, rank: int, seed: int) -> dict[Name, Tensor]:
    b, values, a = leading_pair(weight, rank, seed, module)
    root = values.sqrt()
    return {Name(module, "B1"): b * root, Name(module, "A1"): root[:, None] * a}
