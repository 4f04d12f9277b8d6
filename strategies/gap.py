"""The exactness gap over the rounds of a run, where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsb.adapters import AdapterSpec
from fedsb.adapters.exactness import ExactnessMeter, Gap
from fedsb.adapters.held import HeldWeights
from fedsb.adapters.low_rank import joined
from fedsb.adapters.masked import seen
from fedsb.adapters.residual import Residual
from fedsb.core.blocks import WHOLE, Sight
from fedsb.core.state import HEAD, Name, State
from fedsb.wire.frozen import FrozenView


class GapMeter:
    """Measures each round's exactness gap; switched off, it keeps no upload.

    Args:
        spec: the adapter family.
        scale: s.
        on: whether to measure.
        weights: the frozen weights, to measure what clients compute with too; None: factors alone.
        rest: the factors that reach the server folded into others, as each round finds them.
    """

    def __init__(self, spec: AdapterSpec, scale: float, *, on: bool, weights: HeldWeights | None = None, rest: State | None = None) -> None:
        self._spec = spec
        self._scale = scale
        self._on = on
        self._weights = weights
        self._rest = rest or State()
        self._gap: Gap | None = None
        self._meter: ExactnessMeter | None = None
        self.first = State()
        self._beside: Tensor | None = None

    @property
    def sample(self) -> tuple[str, ...] | None:
        """The modules whose held weights are measured; None where all are, or none."""
        return self._weights.modules if self._weights and self._weights.sampled else None

    def beside(self, estimates: Tensor) -> None:
        """Count a part of this round's mean update that the uploads do not show and nobody is handed: squared norms, to be averaged."""
        self._beside = estimates

    def begin(self, sent: State, frozen: FrozenView, uploaded: Sequence[str]) -> None:
        """Start a round from what clients hold, of which ``uploaded`` come back; changes count from what they held in the first."""
        self._beside = None
        if self._on:
            self._meter = self._meter or self.measure_from(sent.pick(HEAD).merge(_added(frozen)))
            self._meter.begin(sent.merge(self._rest), uploaded)
        if self._on and self._weights:
            self._weights.begin(self._seen(frozen))

    def measure_from(self, state: State) -> ExactnessMeter:
        """Measure changes from ``state``, a head and what a start has taken out of W0: a run that is resumed keeps its first one."""
        self.first = state
        self._meter = ExactnessMeter(self._spec, self._scale, state, self._weights.modules if self._weights else ())
        return self._meter

    def add(self, upload: State, weight: float, sight: Sight = WHOLE) -> None:
        """Take one upload of a client that sees so much of the factors."""
        if self._on and self._meter:
            self._meter.add(upload, weight, sight)

    def measure(self, held: State, *, lost: float) -> tuple[float | None, float | None]:
        """Return the round's gap, and its relative standard error where it is an estimate; None where it is not measured.

        For the arguments see :meth:`ExactnessMeter.measure`.
        """
        self._gap = self._meter.measure(held.merge(self._rest), lost=lost) if self._on and self._meter else None
        if self._gap is not None and self._beside is not None:
            self._gap = self._gap.beside(self._beside)
        return (None, None) if self._gap is None else (self._gap.relative, self._gap.error or None)

    def measure_held(self, held: State, frozen: FrozenView, *, lost: float) -> float | None:
        """Return the gap of the weights that clients compute with, or None where it is not measured; call :meth:`measure` first.

        Where nothing is ever added to W0, that is the gap of factors; for the arguments see :meth:`ExactnessMeter.measure_held`.
        """
        if not self._weights or not self._meter or not frozen.residuals:
            return self._gap.relative if self._weights and self._gap else None
        held, residuals = held.merge(self._rest), self._seen(frozen)
        return self._meter.measure_held(held, self._weights, residuals, lost=lost).relative if self._on else None

    def drift(self, frozen: FrozenView) -> dict[str, float]:
        """Return ``base_drift``, see :meth:`HeldWeights.drift`, where it is measured and rounds add to W0."""
        if not self._on or not self._weights or not frozen.residuals:
            return {}
        return {"base_drift": self._weights.drift(self._seen(frozen), self.first)}

    def _seen(self, frozen: FrozenView) -> Mapping[str, Residual]:
        return seen(self._spec, frozen.residuals, frozen.basis)


def _added(frozen: FrozenView) -> State:
    """Return what the log has added to W0, before any round: what a start has taken out of it."""
    found: dict[Name, Tensor] = {}
    for module, residual in frozen.residuals.items():
        dense = residual.dense
        left, right = joined(residual.pairs, torch.float32) if dense is None else (dense.clone(), torch.eye(dense.shape[1]))
        found |= {Name(module, "U"): left, Name(module, "V"): right}
    return State(found)
