"""The geometry of a family where nothing else of it matters: shapes of factors by name, and how their product splits in two."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]


class Geometry(Protocol):
    """Factors with a product ``U V``: what :class:`fedsb.adapters.spec.AdapterSpec` is, among other things."""

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors in product order."""

    @property
    def split(self) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]]:
        """From the factors in that order to ``U`` (m, ρ) and ``V`` (ρ, n), without s."""
