"""How far the weights that clients *compute* with after a round are from the mean of what they trained.

What is added to W0 is merged into it in its own dtype, which may take 1e-4 of a small residual in float32 and nearly all of it in
bfloat16, or stands beside it, as :mod:`fedsb.adapters.frozen_part` says; no comparison of factors sees that. Here
``‖(W + ΔW) − (W' + Σ w_i ΔW_i)‖_F / ‖Σ w_i ΔW_i‖_F`` is taken, with W' and W the frozen part before and after the round as the layer
computes with it, and float64 for the rest; the head as in :mod:`fedsb.adapters.exactness`. All m x n values of a module are looked at, a
few rows at a time, unless the round has only put factors beside others; of a large model a sample of the modules is measured, and both
norms are over the sample then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.adapters.frozen_part import FACTORS, MERGE, FrozenPart, merged
from fedsb.adapters.low_rank import Term, joined, low_rank_squared_norm
from fedsb.adapters.residual import Residual
from fedsb.core.rng import numpy_generator
from fedsb.core.state import Name, State

MOST_VALUES = 2**24  # of the modules that are measured, unless one alone has more
BLOCK = 2**18  # values in float64 at a time


@dataclass(frozen=True)
class Held:
    """What was added to a weight at a time, in the form in which it is held; ``sources`` tell pairs from others."""

    dense: Tensor | None = None
    pairs: tuple[Term, ...] = ()
    sources: tuple[Term, ...] = ()

    @classmethod
    def of(cls, residual: Residual | None, rule: str) -> Held:
        """Copy what a later round will write to."""
        if residual is None:
            return cls()
        if rule != FACTORS:
            return cls(residual.matrix().clone())
        residual.settle()
        return cls(None if residual.dense is None else residual.dense.clone(), residual.pairs, residual.sources)

    def rows(self, rows: slice, shape: tuple[int, int]) -> Tensor:
        """Return some rows of its sum in float64."""
        if self.dense is not None:
            return self.dense[rows].detach().to("cpu", torch.float64)
        if not self.pairs:
            return torch.zeros(len(range(*rows.indices(shape[0]))), shape[1], dtype=torch.float64)
        left, right = joined([(left[rows], right) for left, right in self.pairs], torch.float64)
        return left @ right

    def since(self, before: Held) -> tuple[Term, ...] | None:
        """Return the pairs that were put beside those of ``before``; None where anything else happened."""
        kept = len(before.sources)
        same = all(now is then for now, then in zip(self.sources, before.sources, strict=False))
        return self.pairs[kept:] if self.dense is before.dense is None and kept <= len(self.pairs) and same else None


class HeldWeights:
    """The frozen parts of a model, or of a sample of its modules, over the rounds of a run.

    Args:
        parts: of every adapted module.
        seed: draws the sample, the same in every round.
    """

    def __init__(self, parts: Mapping[str, FrozenPart], seed: int) -> None:
        self.modules = _sample({name: math.prod(part.shape) for name, part in parts.items()}, seed)
        self.sampled = len(self.modules) < len(parts)
        self._parts = {name: parts[name] for name in self.modules}
        self._before: dict[str, Held] = {}
        self._norms: dict[str, float] = {}

    def begin(self, residuals: Mapping[str, Residual]) -> None:
        """Start a round in which clients train on W0 and these residuals, which the log will add to."""
        self._before = {name: Held.of(residuals.get(name), part.rule) for name, part in self._parts.items()}

    def squared_difference(self, module: str, residuals: Mapping[str, Residual], terms: Sequence[Term]) -> float:
        """Return ``‖W − W' + Σ L R‖_F²``.

        Args:
            module: one of ``modules``.
            residuals: after the round.
            terms: (L, R) of shapes (m, ρ) and (ρ, n).
        """
        part, before = self._parts[module], self._before.get(module, Held())
        after = Held.of(residuals.get(module), part.rule)
        if part.rule != MERGE and (new := after.since(before)) is not None:
            return low_rank_squared_norm([*terms, *new])
        left, right = joined(terms, torch.float64)
        total = 0.0
        for rows in _blocks(*part.shape):
            moved = _effect(part, after, rows) - _effect(part, before, rows)
            total += float(moved.addmm_(left[rows], right).square().sum())
        return total

    def drift(self, residuals: Mapping[str, Residual], start: State) -> float:
        """Return the norm of what rounds have added to W0 over that of W0, over ``modules``.

        Args:
            residuals: all that was added.
            start: ``U`` (m, ρ) and ``V`` (ρ, n) of what the start has added, which is left out.
        """
        moved = 0.0
        for name, part in self._parts.items():
            u, v = Name(name, "U"), Name(name, "V")
            terms = [(-start[u].double(), start[v].double())] if u in start else []
            moved += _squared_norm(Held.of(residuals.get(name), part.rule), part.shape, terms)
            if name not in self._norms:
                self._norms[name] = sum(float(part.pristine[rows].double().square().sum()) for rows in _blocks(*part.shape))
        return math.sqrt(moved / (sum(self._norms.values()) or 1.0))


def _squared_norm(held: Held, shape: tuple[int, int], terms: Sequence[Term]) -> float:
    """Return ``‖D + Σ L R‖_F²`` of what is held (m, n) and terms of shapes (m, ρ) and (ρ, n)."""
    if held.dense is None:
        return low_rank_squared_norm([*held.pairs, *terms]) if held.pairs or terms else 0.0
    return sum(
        float((held.rows(rows, shape) + sum((left[rows] @ right for left, right in terms), start=torch.zeros(()))).square().sum())
        for rows in _blocks(*shape)
    )


def _effect(part: FrozenPart, held: Held, rows: slice) -> Tensor:
    """Return some rows of what a layer computes with, W0 left out where it is the same before and after."""
    if part.rule != MERGE:
        return held.rows(rows, part.shape)
    weight = part.pristine[rows]
    whole = weight if held.dense is None else merged(weight, held.dense[rows])
    return whole.detach().to("cpu", torch.float64)


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
