"""ABBA (Singhal et al. 2025, arXiv:2505.14238): ``ΔW = s (B1 A1) ∘ (B2 A2)``, all four factors trained."""

from __future__ import annotations

from functools import partial
from math import prod

from fedsb.adapters.khatri_rao import Hadamard, pair_ranks, pair_shapes, split, svd_start
from fedsb.adapters.spec import ALWAYS, AdapterSpec, Role


def abba(name: str, roles: tuple[Role, ...], mask: tuple[str, str] | None = None, first: int | None = None) -> AdapterSpec:
    """Return a family of that geometry.

    Args:
        name: of the family.
        roles: B1, A1, B2, A2, and what becomes of them.
        mask: two of them under whose product lies what is added to W0.
        first: r1, by ``adapter.options.first``; None: half of the rank. r2 is the rest.
    """
    return AdapterSpec(
        name=name,
        roles=roles,
        starts={"weight_svd": svd_start(first)},
        shapes=partial(pair_shapes, first=first),
        split=split,
        build=Hadamard,
        configure=partial(abba, name, roles, mask),
        reach=lambda rank: prod(pair_ranks(rank, first)),
        mask=mask,
    )


SPEC = abba("abba", tuple(Role(name, learns=ALWAYS) for name in ("B1", "A1", "B2", "A2")))
