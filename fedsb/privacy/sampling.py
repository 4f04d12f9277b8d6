"""The probability with which an example really enters a Poisson sample."""

from __future__ import annotations

import math

# Opacus' sampler compares float32 uniforms, whole multiples of 2^-24, with q: it draws with probability ceil(q 2^24) / 2^24.
GRID = 2**24
SMALLEST_RATE = 1 / GRID


def drawn_rate(rate: float) -> float:
    """Return q rounded up to the grid of what is drawn, 2^-24; a rate on the grid stays, so plan, ledger and sampler have one number.

    Args:
        rate: q in (0, 1]; 0, where nothing is drawn, stays.
    """
    return math.ceil(rate * GRID) / GRID
