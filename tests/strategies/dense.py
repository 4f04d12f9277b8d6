"""Products of factors densely in float64, each written out: what the project's own algebra is held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


def chain(factors: Factors) -> Tensor:
    """Return the product of the factors in their order."""
    return reduce(torch.matmul, (t.double() for t in factors.values()))


def hadamard(factors: Factors) -> Tensor:
    """Return ``(B1 A1) ∘ (B2 A2)``."""
    b1, a1, b2, a2 = (factors[role].double() for role in ("B1", "A1", "B2", "A2"))
    return (b1 @ a1) * (b2 @ a2)


def cored(factors: Factors) -> Tensor:
    """Return ``Σ_{a,b,c,d} B1[i,a] B2[i,b] R[ab,cd] A1[c,j] A2[d,j]``."""
    b1, b2, a1, a2 = (factors[role].double() for role in ("B1", "B2", "A1", "A2"))
    core = factors["R"].double()
    sizes = b1.shape[1], b2.shape[1]
    return torch.einsum("ia,ib,abcd,cj,dj->ij", b1, b2, (torch.diag(core) if core.dim() == 1 else core).view(*sizes, *sizes), a1, a2)


def headed(factors: Factors) -> Tensor:
    """Return ``Σ_h B_h H_h A_h``, of H as it is uploaded: with its scalars in it."""
    b, h, a = (factors[role].double() for role in ("B", "H", "A"))
    rank = h.shape[1]
    heads = [slice(i * rank, (i + 1) * rank) for i in range(len(h))]
    return sum((b[:, head] @ core @ a[head] for head, core in zip(heads, h, strict=True)), start=torch.zeros(()))


PRODUCTS: dict[str, Callable[[Factors], Tensor]] = {
    "abba": hadamard,
    "abba_masked": hadamard,
    "abba_alternating": hadamard,
    "abba_core": cored,
    "ravan": headed,
}

MASKS = {"abba_masked": ("B1", "A1")}


def added_of(family: str, added: Tensor, factors: Factors) -> Tensor:
    """Return what the log has added to W0 in effect, from its own sum."""
    if family not in MASKS:
        return added.double()
    left, right = (factors[role].double() for role in MASKS[family])
    return (left @ right) * added.double()


def product_of(family: str, factors: Factors) -> Tensor:
    """Return the dense product of a family's factors, without s."""
    return PRODUCTS.get(family, chain)(factors)
