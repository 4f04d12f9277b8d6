"""How far the weights that clients *compute* with after a round are from the mean of what they trained.

A residual is added to W0 in the dtype of W0: float32 takes 1e-5 of a small one away, bfloat16 nearly all, and no comparison of factors sees
that. Here ``‖(fl(W0 + D) + ΔW) − (fl(W0 + D') + Σ w_i ΔW_i)‖_F / ‖Σ w_i ΔW_i‖_F`` is taken, with D' and D the residual before and after the
round, ``fl`` what the layer does, and float64 for the rest; the head as in :mod:`fedsb.adapters.exactness`. All m x n values of a module
are looked at, a few rows at a time; of a large model a sample of the modules is measured, and both norms are over the sample then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedsb.adapters.layer import with_residual
from fedsb.core.rng import numpy_generator

MOST_VALUES = 2**24  # of the modules that are measured, unless one alone has more
BLOCK = 2**18  # values in float64 at a time


class HeldWeights:
    """The frozen weights of a model, or of a sample of its modules, over the rounds of a run.

    Args:
        weights: pristine W0 of every adapted module, (m, n), in the dtype that clients compute with.
        seed: draws the sample, the same in every round.
    """

    def __init__(self, weights: Mapping[str, Tensor], seed: int) -> None:
        self.modules = _sample({name: weight.numel() for name, weight in weights.items()}, seed)
        self.sampled = len(self.modules) < len(weights)
        self._weights = {name: weights[name] for name in self.modules}
        self._before: dict[str, Tensor] = {}

    def begin(self, residuals: Mapping[str, Tensor]) -> None:
        """Start a round in which clients train on W0 and these residuals, which the log will add to in place."""
        self._before = {name: residuals[name].clone() for name in self.modules if name in residuals}

    def squared_difference(self, module: str, residuals: Mapping[str, Tensor], terms: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return ``‖fl(W0 + D) − fl(W0 + D') + Σ L R‖_F²``.

        Args:
            module: one of ``modules``.
            residuals: after the round.
            terms: (L, R) of shapes (m, ρ) and (ρ, n).
        """
        left = torch.cat([term[0].double() for term in terms], dim=1)
        right = torch.cat([term[1].double() for term in terms], dim=0)
        total = 0.0
        for rows in _blocks(*self._weights[module].shape):
            moved = self._held(module, residuals, rows) - self._held(module, self._before, rows)
            total += float(moved.addmm_(left[rows], right).square().sum())
        return total

    def _held(self, module: str, residuals: Mapping[str, Tensor], rows: slice) -> Tensor:
        weight = self._weights[module][rows]
        held = with_residual(weight, residuals[module][rows]) if module in residuals else weight
        return held.detach().to("cpu", torch.float64)


def _sample(sizes: Mapping[str, int], seed: int) -> tuple[str, ...]:
    """Draw modules until the next one would be too many; at least one. All of them where they fit."""
    names = sorted(sizes)
    chosen: list[str] = []
    for i in numpy_generator(seed, "held weights").permutation(len(names)):
        if chosen and sum(sizes[name] for name in (*chosen, names[i])) > MOST_VALUES:
            break
        chosen.append(names[i])
    return tuple(sorted(chosen))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, BLOCK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))
