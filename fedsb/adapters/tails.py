"""The last columns of B and rows of A, which a client that prunes itself presses down and then does without (HetLoRA, arXiv:2401.06432)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.core.state import Name


def kept_rank(rank: int, share: float) -> int:
    """Return the rank without its tail: ``⌊γ r⌋``, at least 1, for a share γ in (0, 1)."""
    return max(1, int(share * rank))


def tails(factors: Mapping[Name, Tensor], share: float) -> list[tuple[Tensor, Tensor]]:
    """Return views of ``B[:, ⌊γ r⌋:]`` and ``A[⌊γ r⌋:]`` of every module that has a tail."""
    pairs = [(b, factors[Name(name.module, "A")]) for name, b in factors.items() if name.role == "B"]
    cut = [(b[:, kept_rank(len(a), share) :], a[kept_rank(len(a), share) :]) for b, a in pairs]
    return [(b, a) for b, a in cut if len(a)]


def tail_norm(factors: Mapping[Name, Tensor], share: float) -> float:
    """Return ``Σ ‖B[:, ⌊γ r⌋:]‖_F ‖A[⌊γ r⌋:]‖_F`` over all modules, in float64."""
    return sum(float(torch.linalg.vector_norm(b.double()) * torch.linalg.vector_norm(a.double())) for b, a in tails(factors, share))
