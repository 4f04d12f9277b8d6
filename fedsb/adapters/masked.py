"""What a run adds to W0 where a family masks it: ``M ∘ (U V)`` with ``M = P Q`` of two factors that rest and that everybody holds.

The log keeps, sends, folds and recompresses ``U V`` as for every other family, and who computes with it puts it under the mask: factors of
``M ∘ (U V)`` are Khatri-Rao products of rank q ρ, for P (m, q), Q (q, n) and U V of rank ρ, or the matrix where they outweigh it. So what
is sent and kept is q times less than what is computed with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.adapters.khatri_rao import columns, rows
from fedsb.adapters.low_rank import Term
from fedsb.adapters.residual import Residual, dense_is_cheaper
from fedsb.adapters.spec import AdapterSpec
from fedsb.core.state import Name, State


class Masked(Residual):
    """A residual under a mask, of what it holds now. Nothing is computed before somebody asks, and no later version is written to it.

    Args:
        bare: what the log holds.
        mask: P (m, q) and Q (q, n).
    """

    def __init__(self, bare: Residual, mask: Term) -> None:
        super().__init__(*bare.shape)
        self.token = bare.token
        self._bare = bare
        self._mask = mask

    @property
    def pairs(self) -> tuple[Term, ...]:
        """What is not in :attr:`dense`, (m, q ρ) and (q ρ, n)."""
        return tuple(under(self._mask, pair) for pair in self.sources)

    @property
    def sources(self) -> tuple[Term, ...]:
        """The log's pairs of which they are made."""
        return self._bare.pairs if self._is_light() else ()

    def matrix(self) -> Tensor:
        """Return all of it as a matrix (m, n) in float32; it is kept where the pairs outweigh it."""
        if self._dense is not None:
            return self._dense
        made = torch.matmul(*self._mask).mul_(self._bare.matrix())
        if not self._is_light():
            self.become(made)
        return made

    def settle(self) -> None:
        """Take the form in which it is held as factors, once the log's own has taken its own."""
        self._bare.settle()
        if not self._is_light():
            self.matrix()

    def writes_to(self, matrix: Tensor) -> bool:
        """Tell whether a later version may be written to a matrix."""
        return False

    def _is_light(self) -> bool:
        rank = self._mask[0].shape[1] * sum(left.shape[1] for left, _ in self._bare.pairs)
        return self._bare.dense is None and not dense_is_cheaper(rank, *self.shape)


def under(mask: Term, pair: Term) -> Term:
    """Return factors (m, q ρ) and (q ρ, n) of ``(P Q) ∘ (U V)``."""
    return columns(mask[0], pair[0]), rows(mask[1], pair[1])


def seen(spec: AdapterSpec, residuals: Mapping[str, Residual], held: State) -> Mapping[str, Residual]:
    """Return what was added to each module as its layer computes with it.

    Args:
        spec: the adapter family.
        residuals: as the log holds them, by module.
        held: with the factors of the mask.
    """
    if spec.mask is None:
        return residuals
    return {module: Masked(residual, _mask(spec.mask, module, held)) for module, residual in residuals.items()}


def pair_seen(spec: AdapterSpec, module: str, pair: Term, held: State) -> Term:
    """Return one pair that a round adds to a module as its layer computes with it."""
    return pair if spec.mask is None else under(_mask(spec.mask, module, held), pair)


def _mask(roles: tuple[str, str], module: str, held: State) -> Term:
    left, right = roles
    return held[Name(module, left)], held[Name(module, right)]
