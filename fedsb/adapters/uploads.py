"""The products of a round's uploads, to be compared with what is handed out: exactly from factors, or by random probes where that is much.

Exactly, ``‖Σ L_j R_j‖_F²`` takes (m + n) ρ² for the summed ranks ρ of all that is compared, and all uploads are kept. Beyond
:data:`EXACT_WORK` it is estimated: ``E ‖D ω‖² = ‖D‖_F²`` for Gaussian ω, of which each module has :data:`PROBES`, the same in every
round; ``D ω`` comes from factors one after the other (4 (m + n) ρ a probe), and no upload is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedsb.adapters.low_rank import Term, image, low_rank_squared_norm
from fedsb.core.rng import torch_generator
from fedsb.core.state import State

EXACT_WORK = 2**36  # multiplications in float64
PROBES = 16


class Uploads:
    """The uploads of a round, or images of their products.

    Args:
        product: from a module, an upload and a weight to L (m, ρ) and R (ρ, n) of the weighted product, in float64.
        ends: the first and the last factor, which are m and n long.
        kept: modules whose uploads are kept in any case.
    """

    def __init__(self, product: Callable[[str, State, float], Term], ends: tuple[str, str], kept: Collection[str] = ()) -> None:
        self._product = product
        self._ends = ends
        self._kept = frozenset(kept)
        self._uploads: list[tuple[State, float]] = []
        self._images: dict[str, Tensor] | None = None
        self._ranks = 0
        self._total = 0.0
        self.modules: Sequence[str] = ()

    @property
    def by_probes(self) -> bool:
        """Whether products are compared by probes from now on."""
        return self._images is not None

    def add(self, upload: State, weight: float) -> None:
        """Take all factors of an upload."""
        self._total += weight
        self.modules = self.modules or upload.modules
        self._uploads.append((upload, weight))
        if self._images is None and self._work(upload) > EXACT_WORK:
            self._images = {}
            self._uploads = [self._projected(each, share) for each, share in self._uploads]
        elif self._images is not None:
            self._uploads[-1] = self._projected(upload, weight)

    def _work(self, upload: State) -> float:
        """Return the multiplications of an exact comparison of what there is, an upload more counted."""
        ends = upload.pick(*self._ends)
        # Of the product, which may be more than that of a factor; the widest module stands for all.
        widest = max(ends, key=lambda name: min(ends[name].shape), default=None)
        self._ranks += 0 if widest is None else self._product(widest.module, upload, 1.0)[0].shape[1]
        return sum(max(t.shape) for t in ends.values()) * float(2 * self._ranks) ** 2

    def _projected(self, upload: State, weight: float) -> tuple[State, float]:
        """Add to the images, and return what is kept."""
        assert self._images is not None
        for module in self.modules:
            term = self._product(module, upload, weight)
            seen = image([term], probes_of(module, term[1].shape[1]))
            self._images[module] = self._images[module].add_(seen) if module in self._images else seen
        return State({name: t for name, t in upload.items() if name.module in self._kept}), weight

    def terms(self, module: str) -> list[Term]:
        """Return the mean product of a module as one term an upload; of one that is kept."""
        return [self._product(module, upload, weight / self._total) for upload, weight in self._uploads]

    def compare(self, module: str, given: Sequence[Term], begun: Sequence[Term] = ()) -> tuple[Tensor, Tensor]:
        """Return the squared norms of ``Σ given`` less the mean product, and of that and ``Σ begun``: one value each, or one a probe."""
        if self._images is None:
            wanted = self.terms(module)
            less = [*given, *((-left, right) for left, right in wanted)]
            apart, whole = ([low_rank_squared_norm(terms)] for terms in (less, [*wanted, *begun]))
            return torch.tensor(apart, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64)
        mean = self._images[module] / self._total
        held = image(given, probes_of(module, given[0][1].shape[1])) if given else torch.zeros_like(mean)
        moved = mean + image(begun, probes_of(module, begun[0][1].shape[1])) if begun else mean
        return (held - mean).square().sum(dim=0), moved.square().sum(dim=0)


def probes_of(module: str, n: int) -> Tensor:
    """Return the Gaussian Ω (n, :data:`PROBES`) of a module, in float64."""
    return _probes(module, n, PROBES)


@lru_cache(maxsize=8)
def _probes(module: str, n: int, count: int) -> Tensor:
    return torch.randn(n, count, dtype=torch.float64, generator=torch_generator(0, "gap probes", module))


def ratio_error(difference: Tensor, update: Tensor) -> float:
    """Return the relative standard error of ``sqrt(mean(difference) / mean(update))``, of estimates by probes; 0 of single exact values."""
    variances = [float(each.var() / len(each) / each.mean().square().clamp_min(1e-300)) for each in (difference, update) if len(each) > 1]
    return 0.5 * math.sqrt(sum(variances))
