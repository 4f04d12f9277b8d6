"""What a run has added to one frozen weight: pairs ``U V`` in the order of versions, and nothing computed of them before somebody asks.

Whoever asks for the matrix gets ``D ← D + U V``, in float32 from zero and in version order; whoever asks for factors gets those that lie
there while their ranks are below ``m n / (m + n)``, where they are lighter than the matrix. When they pass it they are recompressed without
loss, and where that leaves more than half of it the matrix takes their place for good. Both are functions of the pairs and their order
alone: whenever they are asked for, and by whom, the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedsb.adapters.low_rank import Term, joined, recompressed


def dense_is_cheaper(rank: int, m: int, n: int) -> bool:
    """Tell whether ``rank`` columns and rows of factors outweigh the dense (m, n) matrix."""
    return rank * (m + n) > m * n


class Residual:
    """What was added to one frozen weight.

    Args:
        m, n: its shape, (out, in).

    Attributes:
        token: names the content: two of one token hold the same; None where nobody has named it.
    """

    def __init__(self, m: int, n: int) -> None:
        self.shape = m, n
        self.token: str | None = None
        self._pairs: dict[int, Term] = {}  # by version; what came before them is in the matrix
        self._made = 0  # version of the pair that is no delta's own, but stands for all up to it
        self._dense: Tensor | None = None
        self._own = False  # whether the matrix may be written to

    @classmethod
    def of(cls, dense: Tensor) -> Residual:
        """Return one that a matrix (m, n) is all of."""
        made = cls(*dense.shape)
        made.become(dense)
        return made

    def add(self, version: int, left: Tensor, right: Tensor) -> None:
        """Add ``U`` (m, ρ) times ``V`` (ρ, n), which are not copied."""
        self._pairs[version] = left, right

    def become(self, dense: Tensor) -> None:
        """Be a matrix (m, n) and nothing else; it is not copied."""
        self._pairs, self._dense, self._own = {}, dense, False

    def shrink_to(self, version: int, left: Tensor, right: Tensor) -> None:
        """Be one pair and nothing else."""
        self._pairs, self._dense, self._made = {version: (left, right)}, None, version

    def move(self, version: int, left: Tensor, right: Tensor) -> None:
        """Have a delta's own pair of the same values lie elsewhere, if it is still there."""
        if version in self._pairs and version > self._made:
            self._pairs[version] = left, right

    @property
    def pairs(self) -> tuple[Term, ...]:
        """What is not in :attr:`dense`."""
        return tuple(self._pairs.values())

    @property
    def sources(self) -> tuple[Term, ...]:
        """The same objects as long as :attr:`pairs` say the same."""
        return self.pairs

    @property
    def versioned(self) -> Mapping[int, Term]:
        """The same by version."""
        return self._pairs

    @property
    def dense(self) -> Tensor | None:
        """The matrix, where there is one already; the next fold writes to it."""
        return self._dense

    def writes_to(self, matrix: Tensor) -> bool:
        """Tell whether a later version may be written to a matrix."""
        return matrix is self._dense

    def matrix(self) -> Tensor:
        """Return all of it as a matrix (m, n) in float32, not to be written to; it is kept where the pairs outweigh it."""
        if self._dense is not None or self._is_heavy():
            self._fold()
            assert self._dense is not None
            return self._dense
        total = self._zeros()
        for pair in self._pairs.values():
            total.addmm_(*pair)
        return total

    def settle(self) -> None:
        """Take the form in which it is held as factors: :attr:`pairs`, or :attr:`dense` where they became too heavy."""
        waiting, self._pairs = self._pairs, {}
        for version, pair in waiting.items():
            self._pairs[version] = pair
            if self._dense is not None:
                self._fold()
            elif self._is_heavy():
                self._lighten(version)

    def apart(self, *, as_factors: bool) -> Residual:
        """Return one in the form in which it is held, as factors or as a matrix where pairs outweigh it; this one stays as it is."""
        made = Residual(*self.shape)
        made._pairs, made._dense, made._made = dict(self._pairs), self._dense, self._made
        if as_factors:
            made.settle()
        elif made._dense is not None or made._is_heavy():
            made._fold()
        return made

    def _lighten(self, version: int) -> None:
        left, right = recompressed(*joined(self.pairs, torch.float32))
        if dense_is_cheaper(2 * left.shape[1], *self.shape):
            self._fold()
        else:
            self.shrink_to(version, left, right)

    def _fold(self) -> None:
        """Put the pairs into the matrix."""
        if self._dense is None or (self._pairs and not self._own):
            self._dense, self._own = self._zeros() if self._dense is None else self._dense.clone(), True
        for pair in self._pairs.values():
            self._dense.addmm_(*pair)
        self._pairs = {}

    def _is_heavy(self) -> bool:
        return dense_is_cheaper(sum(left.shape[1] for left, _ in self._pairs.values()), *self.shape)

    def _zeros(self) -> Tensor:
        like = next((left for left, _ in self._pairs.values()), torch.empty(0))
        return like.new_zeros(self.shape, dtype=torch.float32)
