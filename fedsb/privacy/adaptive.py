"""What both forms of adaptive clipping share (Andrew et al. 2021, arXiv:1905.03871)."""

from __future__ import annotations

import math

from fedsb.config.checks_privacy import LARGEST_NORM, LEAST_NORM
from fedsb.core.errors import UserError

# Keeps a clipped norm at or below C once the product with its factor is rounded to float32.
MARGIN = 1.0 - 1e-6


def sum_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """Return ``σ_Δ = (σ⁻² − (2 σ_b)⁻²)^(−1/2)``: with it, sum and count together cost one Gaussian release of multiplier σ (theorem 1).

    Args:
        noise_multiplier: σ of the whole release; 0 stays 0.
        count_noise: σ_b, of the count of norms below C, each counted as ±1/2.

    Raises:
        UserError: the count alone would cost as much as both may.
    """
    if noise_multiplier and not noise_multiplier < 2 * count_noise:
        raise UserError(
            f"privacy.count_noise={count_noise} must be above half of the noise multiplier {noise_multiplier:.4g}, as the count is part "
            "of each release; raise it or use privacy.clipping=flat"
        )
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / (2 * count_noise)) ** 2) if noise_multiplier else 0.0


def moved_norm(norm: float, exponent: float) -> float:
    """Return ``C e^exponent`` within :data:`LEAST_NORM` and :data:`LARGEST_NORM`."""
    return min(max(norm * math.exp(min(exponent, 100.0)), LEAST_NORM), LARGEST_NORM)
