"""Algebra of products of factors, without the (m, n) matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.core.state import HEAD, Name, State, WeightedSum, squared_norm


class Stacks:
    """The products of all uploads of a round, of any ranks, stacked by module so that ``U V = s Σ w_i U_i V_i``; and the mean head.

    Memory is that of all uploads: a module's factors are let go where they are taken. An upload's own tensors lie in one block, which the
    last of them would hold as a whole, and so they are copied.

    Args:
        spec: the family, all of whose factors are uploaded; its ``split`` gives ``U_i`` and ``V_i``.
        scale: s.
    """

    def __init__(self, spec: AdapterSpec, scale: float = 1.0) -> None:
        self._spec = spec
        self._scale = scale
        self._head = WeightedSum()
        self._weights: list[float] = []
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, upload: State, weight: float) -> None:
        """Keep the factors of an upload, and add its head to the mean."""
        head = upload.pick(HEAD)
        if len(head):
            self._head.add(head, weight)
        self._weights.append(weight)
        for module in upload.modules:
            left, right = self._spec.split(tuple(upload[Name(module, role)] for role in self._spec.factors))
            self._factors.setdefault(module, []).append((left.clone(), right.clone()))

    @property
    def modules(self) -> list[str]:
        """The adapted modules that have not been taken."""
        return list(self._factors)

    def head(self) -> State:
        """Return the mean of the heads; nothing where there is none."""
        return self._head.mean() if self._head.total_weight else State()

    def take(self, module: str) -> tuple[Tensor, Tensor]:
        """Return ``U`` (m, Σ r_i) and ``V`` (Σ r_i, n) of a module, once."""
        total, pairs = sum(self._weights), self._factors.pop(module)
        right = [self._scale * weight / total * v for weight, (_, v) in zip(self._weights, pairs, strict=True)]
        return torch.cat([u for u, _ in pairs], dim=1), torch.cat(right)


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


def gauge(spec: AdapterSpec, factors: State) -> dict[str, float]:
    """Return ``gauge``, the norm of the factors on the output's side over that of those on the input's: ‖B‖ / ‖A‖, over all modules.

    Equal products split in unequal parts go on differently, for optimisers see the factors. Nothing where either side is not there.
    """
    out, into = (factors.pick(*roles) for roles in sides(spec))
    below = squared_norm(into)
    return {"gauge": (squared_norm(out) / below) ** 0.5} if below and len(out) else {}


def sides(spec: AdapterSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the factors of a family on the output's side, with m in their shape and not n, and those on the input's."""
    m, n, rank = 10_007, 10_009, 5_003  # m and n are no other size of a factor, and whatever share of a rank a family takes, it has it
    shapes = spec.shapes(m, n, rank) if spec.roles else {}

    def having(this: int, other: int) -> tuple[str, ...]:
        return tuple(role for role in spec.factors if this in shapes[role] and other not in shapes[role])

    return having(m, n), having(n, m)
