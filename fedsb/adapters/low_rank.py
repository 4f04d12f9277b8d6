"""Algebra of products ``U V`` of factors, U (m, ρ) and V (ρ, n), without the (m, n) matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Term = tuple[Tensor, Tensor]
ROUNDING = 1e-7  # of the largest singular value: what float32 factors cannot tell from zero


def low_rank_squared_norm(terms: Sequence[Term]) -> float:
    """Return ``‖Σ_j L_j R_j‖_F²`` for L_j (m, ρ_j), R_j (ρ_j, n), through two Gram matrices in float64."""
    left, right = joined(terms, torch.float64)
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def joined(terms: Sequence[Term], dtype: torch.dtype) -> Term:
    """Return ``L`` (m, Σ ρ_j) and ``R`` (Σ ρ_j, n) with ``L R = Σ_j L_j R_j``; a single term as it is."""
    if len(terms) == 1:
        return terms[0][0].to(dtype), terms[0][1].to(dtype)
    return torch.cat([left.to(dtype) for left, _ in terms], dim=1), torch.cat([right.to(dtype) for _, right in terms])


def image(terms: Sequence[Term], probes: Tensor) -> Tensor:
    """Return ``Σ_j L_j (R_j Ω)`` (m, k) in float64 for Ω (n, k), one term after the other: two thin products each."""
    return sum((left.double() @ (right.double() @ probes) for left, right in terms), start=probes.new_zeros(()))


def singular(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of ``left @ right`` in float64, of rank min(m, n, ρ) at most.

    QR of both sides and the SVD of a core of ρ x ρ at most: O((m + n) ρ² + ρ³), where the product's own takes O(m n min(m, n)).

    Returns:
        (m, k), (k,) in falling order, and (k, n).
    """
    q_left, r_left = torch.linalg.qr(left.double())
    q_right, r_right = torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vh @ q_right.T


def recompressed(left: Tensor, right: Tensor, least: float = 0.0) -> Term:
    """Return float32 factors of ``left @ right`` of the smallest rank, at least 1, that loses singular values at rounding level alone.

    Args:
        left: (m, ρ).
        right: (ρ, n).
        least: singular values up to this are noise too, such as what rounding has left behind.
    """
    u, s, vh = singular(left, right)
    rank = max(1, int((s > max(ROUNDING * float(s[0]), least)).sum()))
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).float().contiguous(), (root[:, None] * vh[:rank]).float().contiguous()
