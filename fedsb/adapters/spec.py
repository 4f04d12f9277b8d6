"""What an adapter family is, as data: its factors, which of them are trained, which travel, which are frozen."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSpec:
    """Geometry of a family ``ΔW = s · (product of factors)``.

    Attributes:
        name: key in :data:`fedsb.adapters.SPECS`.
        factors: roles in product order, ``("B", "A")`` or ``("B", "R", "A")``; a family without any adapts no layer.
        trained: roles that a client trains and uploads; they come back averaged.
        frozen: roles that are delivered once through the frozen log and never trained.
        starts: allowed values of ``init.kind``, the default first; empty where there is nothing to start.
    """

    name: str
    factors: tuple[str, ...]
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    starts: tuple[str, ...]

    def shape(self, role: str, out_features: int, in_features: int, rank: int) -> tuple[int, int]:
        """Return the shape of a factor: B is (m, r), R is (r, r), A is (r, n)."""
        return {"B": (out_features, rank), "R": (rank, rank), "A": (rank, in_features)}[role]
