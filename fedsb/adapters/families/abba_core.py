"""Fed-SB in ABBA's geometry: ``ΔW = s Bk R Ak`` with frozen Khatri-Rao factors, R of r1 r2 x r1 r2, or a diagonal of r1 r2."""

from __future__ import annotations

from math import prod

from fedsb.adapters.geometry import Shapes
from fedsb.adapters.khatri_rao import core_start, pair_ranks, pair_shapes, split_core
from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.core.errors import UserError


def abba_core(first: int | None = None, diagonal: bool = False) -> AdapterSpec:
    """Return the family.

    Args:
        first: r1, by ``adapter.options.first``; None: half of the rank. r2 is the rest.
        diagonal: whether R is a diagonal, by ``adapter.options.diagonal``.

    Raises:
        UserError: ``diagonal`` is neither true nor false.
    """
    if not isinstance(diagonal, bool):
        raise UserError(f"adapter.options.diagonal={diagonal} must be true or false")

    def shapes(m: int, n: int, rank: int) -> Shapes:
        size = prod(pair_ranks(rank, first))
        return {**pair_shapes(m, n, rank, first), "R": (size,) if diagonal else (size, size)}

    frozen = {role: Role(role, learns=NEVER, down="log") for role in ("B1", "B2", "A1", "A2")}
    return AdapterSpec(
        name="abba_core",
        roles=(frozen["B1"], frozen["B2"], Role("R"), frozen["A1"], frozen["A2"]),
        starts={"weight_svd": core_start(first, diagonal)},
        shapes=shapes,
        split=split_core,
        configure=abba_core,
        reach=lambda rank: prod(pair_ranks(rank, first)),
    )


SPEC = abba_core()
