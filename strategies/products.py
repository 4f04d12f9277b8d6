"""Algebra of products of factors, without the (m, n) matrix."""

from __future__ import annotations

import torch
from torch import Tensor


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
