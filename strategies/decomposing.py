"""The SVD family's rule: the mean of the products of all uploads, of any ranks, is decomposed anew in each round.

``ΔW = Σ w_i B_i A_i = P S Qᵀ`` from QR of the stacked factors and an SVD of their small core; no (m, n) product is formed. B and A are made
of the leading p columns of P and Q. Two settings tell the methods of the family apart.

* p: the server's rank, or the least that keeps a share τ of the energy ``Σ σ²``, module by module and at most the server's rank. A
  component that the mean does not have is a zero column of B beside a row of A of norm 1 (with ``split=right`` a zero row of A beside a
  column of B of norm 1): it adds nothing to the weights, and can learn. Were both zero, neither would ever have a gradient. Where p is
  chosen by energy, what lies beyond it is a zero column of B beside a drawn row of A: p (m + n) values of a module travel.
* the split of a product between its factors, its gauge: equal products with unequal splits go on differently, for optimisers see the
  factors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.adapters.low_rank import ROUNDING, singular
from fedsb.adapters.redrawn import Redrawn
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State
from strategies.options import number
from strategies.products import Stacks
from strategies.reducers import Aggregate

Split = Callable[[Tensor], tuple[Tensor, Tensor]]


def _left(s: Tensor) -> tuple[Tensor, Tensor]:
    return s, torch.ones_like(s)


def _balanced(s: Tensor) -> tuple[Tensor, Tensor]:
    return s.sqrt(), torch.where(s > 0, s.sqrt(), 1.0)


def _right(s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(s), s


# From the singular values, zero where they are cut, to the norms of B's columns and of A's rows.
SPLITS: dict[str, Split] = {"left": _left, "balanced": _balanced, "right": _right}


@dataclass(frozen=True)
class Cut:
    """How much of a product is kept, and how it is split.

    Attributes:
        energy: τ in (0, 1], the share of ``Σ σ²`` to keep; None: the server's rank, whatever it keeps.
        split: key of :data:`SPLITS`.

    Raises:
        UserError: there is no such share, or no such split.
    """

    energy: float | None = None
    split: str = "left"

    def __post_init__(self) -> None:
        if self.energy is not None:
            said = f"method.options.energy={self.energy} must be a share above 0 and up to 1, or null for the server's rank"
            number(self.energy, lambda value: 0 < value <= 1, said)
        if self.split not in SPLITS:
            raise UserError(f"method.options.split={self.split} is unknown; choose from {', '.join(SPLITS)}")

    def rank(self, s: Tensor, most: int) -> int:
        """Return p from all singular values (k,), in falling order: at most ``most``, and none at rounding level."""
        present = min(most, int((s > ROUNDING * s[0]).sum()))
        if self.energy is None or not present:
            return present
        energies = s.square().cumsum(0)
        return min(present, 1 + int((energies < self.energy * energies[-1]).sum()))


@dataclass
class Kept:
    """What a round keeps of the mean products, over all modules.

    Attributes:
        ranks: p of each module.
        squares: ``Σ σ²`` of all, of what is kept, of what clients of their own ranks are sent, and of the leading components by band.
    """

    ranks: list[int] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)

    def add(self, s: Tensor, kept: int, most: int, ranks: Collection[int]) -> None:
        """Count a module with the singular values s (k,), of which the leading ``kept`` are kept, at the server's rank ``most``."""
        upto = torch.cat([s.new_zeros(1), s.square().cumsum(0)]).tolist()
        bands = {"first": 1, "quarter": max(1, most // 4), "half": max(1, most // 2), "rank": most}
        here = {name: upto[min(band, len(s))] for name, band in bands.items()}
        sent = sum(upto[min(rank, kept)] for rank in ranks) / max(len(ranks), 1)
        self.ranks.append(kept)
        for name, value in {**here, "all": upto[-1], "kept": upto[kept], "sent": sent}.items():
            self.squares[name] = self.squares.get(name, 0.0) + value

    def figures(self, ranks: Collection[int]) -> dict[str, float]:
        """Return the round's figures; see :meth:`Decomposing.finish`."""
        if not self.ranks:
            return {}
        whole = self.squares.pop("all")
        share = {name: value / whole if whole else 1.0 for name, value in self.squares.items()}
        cut = {"cut_error": max(0.0, 1 - share["sent"]) ** 0.5} if ranks else {}
        bands = {f"energy_{name}": share[name] for name in ("first", "quarter", "half", "rank")}
        mean, most = sum(self.ranks) / len(self.ranks), float(max(self.ranks))
        lost = max(0.0, 1 - share["kept"]) ** 0.5
        return {"truncation_error": lost, **cut, "kept_rank": mean, "kept_rank_max": most, "kept_energy": share["kept"], **bands}


class Decomposing:
    """The mean of the head, and the decomposed mean of the products of all uploads.

    Args:
        spec: the adapter family, of the factors B and A.
        ranks: of the clients, to tell what they are not sent of the mean.
        cut: how much is kept, and how it is split.
        redrawn: draws the rows of A beyond what is kept; None: they are directions of what uploads have, or had.
    """

    def __init__(self, spec: AdapterSpec, ranks: Collection[int] = (), cut: Cut | None = None, redrawn: Redrawn | None = None) -> None:
        self._spec = spec
        self._ranks = ranks
        self._cut = cut or Cut()
        self._redrawn = redrawn

    def begin(self, current: State) -> None:
        """Forget the last round; ``current`` has the server's rank."""
        self._current = current
        self._stacks = Stacks(self._spec)

    def add(self, upload: State, weight: float) -> None:
        """Take one upload, of any rank."""
        self._stacks.add(upload, weight)

    def finish(self) -> Aggregate:
        """Return the mean head, and B and A of each module at the server's rank r.

        ``extras``, over all modules: ``truncation_error``, the norm of what is not kept over that of the mean product; where
        ``federation.ranks`` gives clients their own, ``cut_error``, the same of what they are not sent, root mean square over all;
        ``kept_rank`` and ``kept_rank_max``, mean and largest p; ``kept_energy``, the share of ``Σ σ²`` that is kept, and ``energy_first``,
        ``energy_quarter``, ``energy_half`` and ``energy_rank``, that of the leading 1, r/4, r/2 and r components.
        """
        found: dict[Name, Tensor] = {}
        kept = Kept()
        for module in self._current.modules:
            a, b = Name(module, "A"), Name(module, "B")
            found[b], found[a] = self._handed_out(module, *self._stacks.take(module), self._current[a], kept)
        return Aggregate(self._stacks.head().merge(State(found)), extras=kept.figures(self._ranks))

    def _handed_out(self, module: str, left: Tensor, right: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """Return B (m, r) and A (r, n) of ``left @ right``, and count them; ``before`` is the last A (r, n)."""
        most = len(before)
        p, s, q = components(left, right, before)
        rank = self._cut.rank(s, most)
        kept.add(s, rank, most, self._ranks)
        b, a = pair(p, s, q, most, rank, self._cut.split)
        if self._redrawn:
            b[:, rank:], a[rank:] = 0, self._redrawn.rows(module, a.shape)[rank:].to(a)
        return b, a


def components(left: Tensor, right: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of ``left @ right`` in float64, of r components at least; ``before`` is the last A (r, n)."""
    most = len(before)
    missing = max(0, most - left.shape[1])  # directions of the last A that no upload has, at weight zero
    wide = torch.cat([left, left.new_zeros(len(left), missing)], dim=1), torch.cat([right, before[most - missing :].to(right)])
    return singular(*wide)


def pair(p: Tensor, s: Tensor, q: Tensor, most: int, rank: int, split: str) -> tuple[Tensor, Tensor]:
    """Return B (m, r) and A (r, n) of the leading ``rank`` components; see :data:`SPLITS` for what becomes of the others, up to r."""
    columns, rows = SPLITS[split](torch.where(torch.arange(most) < rank, s[:most], 0.0))
    return (p[:, :most] * columns).float(), (rows[:, None] * q[:most]).float()
