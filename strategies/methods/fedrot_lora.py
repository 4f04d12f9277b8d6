"""FedRot-LoRA (Zhang et al. 2026, arXiv:2602.23638): factors are rotated towards what was sent, and averaged.

``(B_i R)(Rᵀ A_i) = B_i A_i`` for any orthogonal R, but the product of the means depends on it: means of factors that lie alike miss less of
the mean product. R aligns A with what was sent in even rounds, and B in odd ones (odd and even in the paper and its code, which count from
0). With ``M = A_ref A_iᵀ``, or ``M = B_refᵀ B_i``, and ``M = U Σ Vᵀ``, the nearest rotation is ``R* = V diag(1, …, 1, det V Uᵀ) Uᵀ``
(orthogonal Procrustes), and R is the rotation nearest to ``(1 − λ) I + λ R*``. Round 1 is left out, for all start alike in it.

In the paper clients rotate before they upload. Here the server does, which knows what it sent: the message has the same shapes, and the
means are the same, but for the rounding of a coarse wire, which then comes before the rotation and not behind it. λ = 0 is FedIT to the
bit; under example-level privacy a rotation is post-processing of what was noised. Not exact: the gap is measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.options import number
from strategies.reducers import Aggregate, PlainMean, Reducer


def rotation(m: Tensor) -> Tensor:
    """Return the R (r, r), orthogonal with determinant 1, that makes tr(M R) largest, in float64: orthogonal Procrustes by the SVD of M."""
    u, _, vh = torch.linalg.svd(m.double())
    signs = torch.ones(len(m), dtype=torch.float64)
    signs[-1] = torch.linalg.det(vh.T @ u.T).sign()
    turn: Tensor = (vh.T * signs) @ u.T
    return turn


def partial_rotation(m: Tensor, strength: float) -> Tensor:
    """Return the rotation (r, r) nearest to ``(1 − λ) I + λ R*``, with R* that of :func:`rotation` and λ the strength."""
    blend = (1 - strength) * torch.eye(len(m), dtype=torch.float64) + strength * rotation(m)
    return rotation(blend.T)


class Aligned:
    """The mean of every tensor, of factors that are rotated towards those that were sent.

    Args:
        side: the factor to align, ``A`` or ``B``.
        strength: λ.
    """

    def __init__(self, side: str, strength: float) -> None:
        self._side = side
        self._strength = strength

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` is what uploads are aligned with."""
        self._current = current
        self._mean = PlainMean()
        self._turned: list[float] = []

    def add(self, upload: State, weight: float) -> None:
        """Take one upload."""
        turned: dict[Name, Tensor] = {}
        for module in upload.modules:
            a, b = Name(module, "A"), Name(module, "B")
            r = partial_rotation(self._matched(upload, a, b), self._strength)
            turned[b], turned[a] = upload[b].double() @ r, r.T @ upload[a].double()
            self._turned.append(float((r - torch.eye(len(r))).square().sum()) / len(r))
        self._mean.add(upload.merge(State(turned)), weight)

    def finish(self) -> Aggregate:
        """Return the mean; ``extras`` hold ``rotation``, the root mean square of ‖R − I‖_F / √r, up to 2."""
        mean = self._mean.finish().state
        return Aggregate(mean, extras={"rotation": (sum(self._turned) / max(len(self._turned), 1)) ** 0.5})

    def _matched(self, upload: State, a: Name, b: Name) -> Tensor:
        """Return ``M`` (r, r) of a module."""
        if self._side == "A":
            return self._current[a].double() @ upload[a].double().T
        return self._current[b].double().T @ upload[b].double()


class FedRotLoRA(LowRankStrategy):
    """Average A, B and the head, the factors rotated towards what was sent.

    Args:
        strength: λ, from 0 (no rotation) to 1 (all of it).
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: there is no such strength.
    """

    def __init__(self, *, strength: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        said = f"method.options.strength={strength} must be a number from 0, which is FedIT, to 1"
        self._strength = number(strength, lambda value: 0 <= value <= 1, said)

    def over_uploads(self) -> Reducer:
        """Return the mean, of rotated factors from round 2 on."""
        assert self._round is not None
        current = self._round.number
        return Aligned("B" if current % 2 else "A", self._strength) if current > 1 and self._strength else PlainMean()
