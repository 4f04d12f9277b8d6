"""LoRA-SB's start as a federated sketch: the shared gradient SVD before round 1, without anyone's raw data or full gradients.

Each exchange is a weighted mean over the clients of a product with their gradient (see :class:`fedsb.adapters.starts.Sketch`);
what the family makes of the result is version 1 of the frozen log and the first trained state: with LoRA-SB B and A, and R0. Bytes count
as one-off.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from fedsb.adapters.starts import Sketch
from fedsb.core.state import Layout, State, WeightedSum
from fedsb.wire.arrays import decode_state, encode_arrays
from fedsb.wire.sketch_layouts import reply_layout
from strategies.base import LowRankStrategy
from strategies.privacy.mean import PrivateSum


class GradientStart:
    """Runs the exchanges of a sketch over the clients.

    Args:
        sketch: widths, iterations and the seed of Ω.
        shapes: (m, n) of the adapted modules.
        core_kind: ``zero`` or ``spectral``, see :func:`fedsb.adapters.starts.core`.
        step: η of the spectral core.
        noised: whether client-level privacy, where it is asked for, covers the start too.
    """

    def __init__(self, sketch: Sketch, shapes: Mapping[str, tuple[int, int]], *, core_kind: str, step: float, noised: bool = False) -> None:
        self._noised = noised
        self._sketch = sketch
        self._shapes = shapes
        self._core_kind = core_kind
        self._step = step

    def __call__(self, strategy: LowRankStrategy, grid: Grid, initial: ArrayRecord) -> ArrayRecord:
        """Run the start; append what belongs there to the strategy's frozen log, and return the first trained state."""
        probes = State()
        mean = State()
        for number in range(len(self._sketch.exchanges)):
            probes = self._sketch.basis(mean) if number else State()
            title = f"start: gradient sketch, exchange {number + 1} of {len(self._sketch.exchanges)}"
            mean = self._mean(strategy, grid, number, probes, title)
        spec = strategy.spec
        assert spec.from_gradient is not None
        factors = spec.from_gradient(self._sketch.finish(mean, probes), self._core_kind, self._step, strategy.scale)
        strategy.frozen.append(factors.pick(*spec.in_log))
        first = decode_state(initial, strategy.down).merge(factors.pick(*spec.in_state))
        return encode_arrays(first, strategy.wire_dtype)

    def _mean(self, strategy: LowRankStrategy, grid: Grid, number: int, probes: State, title: str) -> State:
        stage = self._sketch.exchanges[number]
        layout = reply_layout(self._sketch, self._shapes, stage)
        private = strategy.participation.client_unit if self._noised else None
        total: WeightedSum | PrivateSum = private.start_sum(layout, number, real=not strategy.simulated) if private else WeightedSum()
        # The same stage comes several times in a start, and each is a release of its own.
        for upload in strategy.exchange(grid, f"{stage}.{number}", encode_arrays(probes), Layout.of(probes), layout, title=title):
            if isinstance(total, PrivateSum):
                total.add(upload.state)
            else:
                total.add(upload.state, strategy.weighting.weight(upload.client, upload.num_examples))
        return total.mean()
