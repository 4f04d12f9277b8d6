"""FedMomentum (arXiv:2603.08014): the mean of the products is handed out as its leading pair, and the rest goes into the frozen weights.

``ΔW = Σ w_i B_i A_i = P S Qᵀ``; ``B = P_r √S_r`` and ``A = √S_r Q_rᵀ`` are what clients go on with, so that they keep the directions in
which all of them have moved, and ``s Σ_{r < j ≤ p} p_j σ_j q_jᵀ`` is added to W0, with p the least that keeps a share τ of the energy
``Σ σ²``. (The published code adds it without s.) With τ = 1 pair and rest are the mean product: the exact sibling of FRLoRA, which adds
what its means have moved. A coarse wire rounds the pair, and what that takes away goes into the weights too.

What differs from the paper: the decomposition is exact, from QR of the stacked factors, where the paper's is a randomised one; and the rest
has the layout of its largest rank, (k − 1) r, so that its bytes are known before the run: what τ cuts is zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State
from strategies.base import LowRankStrategy
from strategies.decomposing import Cut, Decomposing, Kept, components, pair
from strategies.reducers import Aggregate, Reducer


class PairAndRest(Decomposing):
    """The mean head, the leading pair of the mean products, and the rest of them as ``U`` (m, ρ) and ``V`` (ρ, n), with s.

    Args:
        spec: the adapter family, of the factors B and A.
        scale: s.
        cut: τ, of pair and rest together, and the split of the pair.
        decode: rounds a state to what clients decode from the wire.
        coarse: whether it rounds below float32; what it takes away is 2 r ranks more of the rest.
        truncate: the most components of the rest; None for all.
    """

    def __init__(
        self, spec: AdapterSpec, scale: float, cut: Cut, decode: Callable[[State], State], *, coarse: bool, truncate: int | None
    ) -> None:
        super().__init__(spec, cut=cut)
        self._scale = scale
        self._decode = decode
        self._coarse = coarse
        self._truncate = truncate

    def begin(self, current: State) -> None:
        """Forget the last round."""
        super().begin(current)
        self._rest: dict[Name, Tensor] = {}

    def finish(self) -> Aggregate:
        """Return head, pairs and rest; for the figures see :meth:`Decomposing.finish`: what is kept is pair and rest."""
        made = super().finish()
        return Aggregate(made.state, State(self._rest), made.extras)

    def _handed_out(self, module: str, left: Tensor, right: Tensor, before: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        most, width = len(before), rest_rank(left.shape[1], len(before), self._truncate)
        p, s, q = components(left, right, before)
        present = Cut().rank(s, most)
        here = min(max(present, self._cut.rank(s, len(s))), most + width)
        kept.add(s, here, most, ())
        b, a = pair(p, s, q, most, present, self._cut.split)
        rest = [(p[:, most:here] * s[most:here], q[most:here])]
        if self._coarse:
            decoded = self._decoded(module, b, a)
            rest.append(_missed(p[:, :most] * s[:most], q[:most], *decoded))
            b, a = decoded  # as it is made up for
        self._rest |= self._laid_out(module, width + (2 * most if self._coarse else 0), rest)
        return b, a

    def _decoded(self, module: str, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        names = Name(module, "B"), Name(module, "A")
        there = self._decode(State(dict(zip(names, (b, a), strict=True))))
        return there[names[0]].double(), there[names[1]].double()

    def _laid_out(self, module: str, width: int, rest: Sequence[tuple[Tensor, Tensor]]) -> dict[Name, Tensor]:
        """Return ``U`` and ``V`` of so many columns and rows, zero where there are fewer; nothing where there are none."""
        left, right = (torch.cat(sides, dim=dim) for dim, sides in enumerate(zip(*rest, strict=True), start=-1))
        spare = width - len(right)
        wide, high = torch.nn.functional.pad(left, (0, spare)), torch.nn.functional.pad(self._scale * right, (0, 0, 0, spare))
        return {Name(module, "U"): wide.float(), Name(module, "V"): high.float()} if width else {}


def _missed(left: Tensor, right: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a pair misses of ``left @ right``."""
    return torch.cat([left, -b], dim=1), torch.cat([right, a])


def rest_rank(stacked: int, rank: int, most: int | None) -> int:
    """Return the rank of what uploads of ``stacked`` ranks together leave beside a pair of ``rank``, cut to ``most``."""
    return stacked - rank if most is None else min(stacked - rank, most)


class FedMomentum(LowRankStrategy):
    """Hand out the leading pair of the mean products, add the rest to the frozen weights; average the head.

    Args:
        energy: τ, the share of a product's energy that pair and rest keep, module by module; None or 1: all of it.
        truncate: the most components of the rest that are sent; None: all, (k − 1) r.
        split: of the pair; see :class:`strategies.methods.flexlora.FlexLoRA`.
        options: see :class:`strategies.base.LowRankStrategy`.

    Raises:
        UserError: there is no such share, rank or split.
    """

    anew = ("B", "A")

    def __init__(self, *, energy: float | None = 0.9999, truncate: int | None = None, split: str = "balanced", **options: Any) -> None:
        super().__init__(**options)
        if truncate is not None and (type(truncate) is not int or truncate < 1):
            raise UserError(f"method.options.truncate={truncate} must be a rank of at least 1, or null for all that the energy keeps")
        self._cut = Cut(energy, split)
        self._truncate = truncate
        self._coarse = self.wire_dtype != "float32"

    @property
    def is_exact(self) -> bool:
        """Whether pair and rest are the whole mean product."""
        return self._cut.energy in (None, 1) and self._truncate is None

    def residual_rank(self, ranks: Sequence[int]) -> int:
        """Return (k − 1) r, or the truncation where it is smaller, and 2 r more on a coarse wire."""
        return rest_rank(sum(ranks), ranks[0], self._truncate) + (2 * ranks[0] if self._coarse else 0)

    def over_uploads(self) -> Reducer:
        """Return the decomposition."""
        return PairAndRest(self.spec, self.scale, self._cut, self.decode, coarse=self._coarse, truncate=self._truncate)
