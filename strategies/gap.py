"""The exactness gap over the rounds of a run, where it is asked for."""

from __future__ import annotations

from fedsb.adapters import AdapterSpec
from fedsb.exactness import ExactnessMeter
from fedsb.state import HEAD, State


class GapMeter:
    """Measures each round's exactness gap; switched off, it keeps no upload.

    Args:
        spec: the adapter family.
        scale: s.
        on: whether to measure.
    """

    def __init__(self, spec: AdapterSpec, scale: float, *, on: bool) -> None:
        self._spec = spec
        self._scale = scale
        self._on = on
        self._meter: ExactnessMeter | None = None
        self.first_head = State()

    def begin(self, basis: State, current: State) -> None:
        """Start a round from ``current``; the head's change is measured from that of the first one."""
        if self._on:
            self._meter = self._meter or self.measure_from(current)
            self._meter.begin(basis)

    def measure_from(self, state: State) -> ExactnessMeter:
        """Measure the head's change from that of ``state``: a run that is resumed keeps its first one."""
        self.first_head = state.pick(HEAD)
        self._meter = ExactnessMeter(self._spec, self._scale, state)
        return self._meter

    def add(self, upload: State, weight: float) -> None:
        """Take one upload."""
        if self._on and self._meter:
            self._meter.add(upload, weight)

    def measure(self, held: State, residual: State, *, lost: float) -> float | None:
        """Return the round's gap, or None where it is not measured; for the arguments see :meth:`ExactnessMeter.measure`."""
        return self._meter.measure(held, residual, lost=lost).relative if self._on and self._meter else None
