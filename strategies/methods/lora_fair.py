"""LoRA-FAIR (Bian et al. 2025, arXiv:2411.14961): means of A and B, and a correction of B towards the mean product.

``ΔB = argmin −cos(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖_F`` with ``ΔW = Σ w_i B_i A_i`` (equation 8); B̄ + ΔB and Ā are handed out. λ = 0 would take any
multiple of the best B (the nearest is taken here), which its paper finds worse than the means themselves; from some λ on ΔB is zero,
and the method FedIT. Not exact: what lies outside the rows of Ā is missed, and a cosine sees no length.

Its paper takes steps of SGD, of an unstated number. Here the minimum itself is found: where it is stationary,
``X = B̄ + ΔB = (a C + B̄)(I + b G)⁻¹`` with ``C = ΔW Āᵀ``, ``G = Ā Āᵀ`` and two numbers that ``b ‖X‖_G² = a ⟨C, X⟩`` joins:
for every cosine the B that is nearest to the mean. So b alone is left to look through, which in the eigenbasis of G is arithmetic on
r numbers; no (m, n) product is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.adapters.low_rank import low_rank_squared_norm
from fedsb.core.state import Name, State, squared_norm, subtract
from strategies.base import LowRankStrategy
from strategies.options import number
from strategies.products import Stacks
from strategies.reducers import Aggregate, PlainMean, Reducer

SPAN = 1e12  # of b, on either side of 1 / the largest eigenvalue of G
POINTS, LOOKS = 257, 6  # of b in one look, and how often the best one's neighbourhood is looked at more closely
NOTHING = 1e-13  # an eigenvalue of G that is zero, to the largest; a gain of the objective that is rounding


@dataclass(frozen=True)
class Path:
    """The best corrections of every length, for one module: B in the eigenbasis of G, as r numbers of each kind.

    Attributes:
        g: eigenvalues of G (r,).
        bb, bc, cc: squared norms of the columns of B̄, their products with those of C, and squared norms of these (r,).
        norm: ‖ΔW‖_F.
    """

    g: Tensor
    bb: Tensor
    bc: Tensor
    cc: Tensor
    norm: float

    def first(self, b: Tensor) -> Tensor:
        """Return the a (k,) that belong to b (k,): the positive root of ``b ‖a E + F‖_G² = a ⟨C, a E + F⟩``, with X = a E + F."""
        once = 1 / (1 + b[:, None] * self.g)
        twice = once.square()
        second = (self.cc * twice).sum(1)
        first = (self.bc * (once - 2 * b[:, None] * self.g * twice)).sum(1)
        zeroth = b * (self.g * self.bb * twice).sum(1)
        root = (first.square() + 4 * second * zeroth).sqrt()
        return torch.where(first > 0, 2 * zeroth / (first + root), (root - first) / (2 * second))

    def objective(self, b: Tensor, strength: float) -> Tensor:
        """Return ``−cos(ΔW, X Ā) + λ ‖X − B̄‖_F`` (k,) at b (k,); b = 0 is B̄ where it does not point away from ΔW."""
        a, shrunk = self.first(b)[:, None], b[:, None] * self.g
        twice = (1 + shrunk).square()
        along = ((a * self.cc + self.bc) / (1 + shrunk)).sum(1)
        size = (self.g * (a * a * self.cc + 2 * a * self.bc + self.bb) / twice).sum(1).sqrt()
        moved = ((a * a * self.cc - 2 * a * shrunk * self.bc + shrunk.square() * self.bb) / twice).sum(1).clamp(min=0).sqrt()
        return -along / (self.norm * size) + strength * moved

    def best(self, strength: float) -> tuple[float, float] | None:
        """Return a and b of the smallest objective for λ > 0; None where B̄ has it.

        There may be several minima along b, and all are looked at. There may be none, where every B of the best cosine points away from B̄:
        the objective falls towards B = 0 then, where it is not defined, and the best that was looked at is taken.
        """
        low, high = (math.log(end / float(self.g.max())) for end in (1 / SPAN, SPAN))
        for _ in range(LOOKS):
            logs = torch.linspace(low, high, POINTS, dtype=torch.float64)
            values = self.objective(logs.exp(), strength)
            place = int(values.argmin())
            low, high = float(logs[max(0, place - 1)]), float(logs[min(POINTS - 1, place + 1)])
        means = -self.bc.sum() / (self.norm * (self.g * self.bb).sum().sqrt())
        if not values[place] < means - NOTHING:
            return None
        b = logs[place : place + 1].exp()
        return float(self.first(b)), float(b)


def corrected(b: Tensor, c: Tensor, gram: Tensor, norm: float, strength: float) -> Tensor:
    """Return ``B̄ + ΔB`` (m, r) in float64; B̄ where it, or what its product can reach of ΔW, is zero.

    Args:
        b: B̄ (m, r).
        c: C (m, r).
        gram: G (r, r).
        norm: ‖ΔW‖_F.
        strength: λ.
    """
    values, vectors = torch.linalg.eigh(gram)
    there = values > NOTHING * values[-1]
    g, means, wanted = torch.where(there, values, 0.0), b @ vectors, torch.where(there, c @ vectors, 0.0)
    path = Path(g, means.square().sum(0), (means * wanted).sum(0), wanted.square().sum(0), norm)
    if not path.cc.sum() or not (g * path.bb).sum():
        return b
    if strength:
        found = path.best(strength)
        return b if found is None else ((found[0] * wanted + means) / (1 + found[1] * g)) @ vectors.T
    fitted = torch.where(there, wanted / g, 0.0)
    length = float((fitted * means).sum() / fitted.square().sum())
    nearest: Tensor = torch.where(there, (length if length > 0 else 1.0) * fitted, means) @ vectors.T
    return nearest


class Correcting:
    """The means of A, B and head, B corrected.

    Args:
        spec: the adapter family, of the factors B and A.
        strength: λ.
    """

    def __init__(self, spec: AdapterSpec, strength: float) -> None:
        self._spec = spec
        self._strength = strength

    def begin(self, current: State) -> None:
        """Forget the last round."""
        self._mean = PlainMean()
        self._stacks = Stacks(self._spec)

    def add(self, upload: State, weight: float) -> None:
        """Take one upload."""
        self._mean.add(upload, weight)
        self._stacks.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the means, B corrected; ``extras`` hold ``correction``, ‖ΔB‖ / ‖B̄‖ over all modules."""
        mean = self._mean.finish().state
        found: dict[Name, Tensor] = {}
        for module in self._stacks.modules:
            b, a = mean[Name(module, "B")].double(), mean[Name(module, "A")].double()
            left, right = (t.double() for t in self._stacks.take(module))
            norm = low_rank_squared_norm([(left, right)]) ** 0.5
            found[Name(module, "B")] = corrected(b, left @ (right @ a.T), a @ a.T, norm, self._strength)
        made, before = State(found), squared_norm(mean.pick("B"))
        moved = squared_norm(subtract(made, mean))
        return Aggregate(mean.merge(made), extras={"correction": (moved / before) ** 0.5 if before else 0.0})


class LoRAFAIR(LowRankStrategy):
    """Average A, B and the head; correct B.

    Args:
        strength: λ, at least 0.
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: there is no such strength.
    """

    def __init__(self, *, strength: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        said = f"method.options.strength={strength} must be a number of at least 0, at which B is not held to its mean"
        self._strength = number(strength, lambda value: 0 <= value < math.inf, said)

    def over_uploads(self) -> Reducer:
        """Return the means and the correction."""
        return Correcting(self.spec, self._strength)
