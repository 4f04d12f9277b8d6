"""Sums of heads between frozen factors, ``Σ_h t_h B_h H_h A_h``: RAVAN's geometry (Raje et al. 2025, arXiv:2506.05568).

The heads lie side by side: B = [B_1 … B_k] is (m, k r), A = [A_1; …; A_k] (k r, n), H (k, r, r) and t (k,). The sum is ``U A`` with
``U = [t_1 B_1 H_1 … t_k B_k H_k]``, of rank k r at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedsb.adapters.starts import frames
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State

LayerShapes = Mapping[str, tuple[int, int]]


def head_shapes(m: int, n: int, rank: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the four factors, of so many heads of a rank."""
    return {"B": (m, heads * rank), "H": (heads, rank, rank), "t": (heads,), "A": (heads * rank, n)}


def split(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Split the sum of the heads of B, H, t, A into U (m, k r) and A (k r, n)."""
    b, h, t, a = factors
    cores = scaled_cores({"t": t, "H": h})
    return torch.einsum("mki,kij->mkj", b.reshape(len(b), *cores.shape[:2]), cores).flatten(1), a


def scaled_cores(trained: Mapping[str, Tensor]) -> Tensor:
    """Return ``t_h H_h`` of every head (k, r, r): what of a client's training is linear in the weight, and has a mean."""
    return trained["t"][:, None, None] * trained["H"]


class Heads(nn.Module):
    """``s``-free forward of the sum.

    Args:
        shapes: of B, H, t, A.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.B, self.H, self.t, self.A = (nn.Parameter(torch.empty(shapes[role])) for role in ("B", "H", "t", "A"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m): 2 k r² and (m + n) k r a token."""
        cores = scaled_cores({"t": self.t, "H": self.H}).to(x)
        inner = F.linear(x, self.A.to(x)).reshape(*x.shape[:-1], *cores.shape[:2])  # (…, k, r)
        return F.linear(torch.einsum("kij,...kj->...ki", cores, inner).flatten(-2), self.B.to(x))


def orthogonal_heads(heads: int) -> Callable[[LayerShapes, int, int], State]:
    """Return RAVAN's start: columns of B and rows of A orthonormal over all heads, uniform over such frames, and every H zero.

    Heads of one module share no direction, so that together they reach rank k r.
    """

    def start(layers: LayerShapes, rank: int, seed: int) -> State:
        tensors: dict[Name, Tensor] = {}
        for module, (m, n) in layers.items():
            b, a = frames(m, n, heads * rank, torch_generator(seed, "start", module))
            tensors |= {Name(module, "B"): b, Name(module, "A"): a, Name(module, "H"): torch.zeros(heads, rank, rank)}
        return State(tensors)

    return start
