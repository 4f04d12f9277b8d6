"""What a private sketch can be worth, before any data is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedsb.adapters.starts import Side


def forecast_snr(
    noise_multiplier: float,
    max_norm: float,
    expected: float,
    shapes: Mapping[str, tuple[int, int]],
    width: Callable[[int, int], int],
    side: Side,
) -> float:
    """Return an upper bound on a noised sketch's signal-to-noise ratio, ``expected / (σ √d)`` for its d values. It needs no data.

    The signal is that of examples whose products all have norm C and all point the same way, ``expected · C``; the noise has norm
    ``σ C √d``. No examples' gradients are all aligned, so the true ratio lies below: a forecast under 1 rules a start out, one above 1
    doesn't promise one.

    Args:
        noise_multiplier: σ of the exchange; 0 gives infinity.
        max_norm: C, to which signal and noise are both proportional: it cancels.
        expected: expected number of examples, summed over the clients. Their noises add up too: for k clients with noise of their own
            pass ``σ √k``.
        shapes: (m, n) of every adapted layer.
        width: (m, n) to l, :meth:`fedsb.adapters.starts.Sketch.width`.
        side: ``right`` for d = Σ l·m, ``left`` for d = Σ l·n.
    """
    rows = {"right": 0, "left": 1}[side]
    values = sum(shape[rows] * width(*shape) for shape in shapes.values())
    noise = noise_multiplier * max_norm * math.sqrt(values)
    return expected * max_norm / noise if noise else math.inf
