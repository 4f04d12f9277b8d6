"""LoRA-SB's start as a federated sketch: the shared gradient SVD before round 1, without anyone's raw data or full gradients.

Each exchange is a weighted mean over the clients of a product with their gradient (see :class:`fedsb.adapters.starts.Sketch`);
its result B, A is version 1 of the frozen log, and R0 the first trained state. Bytes count as one-off.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedsb.adapters.starts import Sketch, core
from fedsb.messages import decode_arrays, encode_arrays
from fedsb.sketching import reply_layout
from fedsb.state import Layout, State, WeightedSum, unpack
from strategies.base import LowRankStrategy
from strategies.participation import WEIGHTINGS


class GradientStart:
    """Runs the exchanges of a sketch over the clients.

    Args:
        sketch: widths, iterations and the seed of Ω.
        shapes: (m, n) of the adapted modules.
        core_kind: ``zero`` or ``spectral``, see :func:`fedsb.adapters.starts.core`.
        step: η of the spectral core.
    """

    def __init__(self, sketch: Sketch, shapes: Mapping[str, tuple[int, int]], *, core_kind: str, step: float) -> None:
        self._sketch = sketch
        self._shapes = shapes
        self._core_kind = core_kind
        self._step = step

    def __call__(self, strategy: LowRankStrategy, grid: Grid, initial: ArrayRecord) -> ArrayRecord:
        """Run the start; append B and A to the strategy's frozen log and return the first trained state."""
        probes = State()
        mean = State()
        for number, stage in enumerate(self._sketch.exchanges):
            probes = self._sketch.basis(mean) if number else State()
            title = f"start: gradient sketch, exchange {number + 1} of {len(self._sketch.exchanges)}"
            mean = self._mean(strategy, grid, stage, probes, title)
        found = self._sketch.finish(mean, probes)
        strategy.frozen.append(found.pick("A", "B"))
        trained = unpack(decode_arrays(initial), strategy.layout)
        first = trained.merge(core(found, self._core_kind, step=self._step, scale=strategy.scale))
        return encode_arrays(first, strategy.wire_dtype)

    def _mean(self, strategy: LowRankStrategy, grid: Grid, stage: str, probes: State, title: str) -> State:
        total = WeightedSum()
        layout = reply_layout(self._sketch, self._shapes, stage)
        for upload in strategy.exchange(grid, stage, encode_arrays(probes), Layout.of(probes), layout, title=title):
            total.add(upload.state, WEIGHTINGS[strategy.participation.weighting](upload.num_examples))
        return total.mean()
