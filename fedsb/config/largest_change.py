"""By how much one round of local training can change a value, from the configuration alone: what bounds a secure sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from fedsb.config.schema import PrivacyConfig, TrainConfig

BETA1, BETA2 = 0.9, 0.999  # of torch's AdamW, which a run does not change
SLACK = 1.01  # for float32, in which a step may be a little longer than the bound says
TAIL = 8.0  # deviations of the noise that a value stays below, but for one of 10^15


def largest_change(train: TrainConfig, privacy: PrivacyConfig, examples: int) -> float | None:
    """Return the largest change of a value in a round of a client with at most so many examples; None where nothing bounds it.

    The rate is taken at its peak. With momentum μ no step is longer than 1 / (1 − μ) of the longest gradient.
    """
    steps = train.local_steps or train.local_epochs * math.ceil(examples / train.batch_size)
    by_steps = _BY_OPTIMIZER[train.optimizer](train, privacy, steps)
    return None if by_steps is None or train.weight_decay else SLACK * train.lr * by_steps


def _adamw(train: TrainConfig, privacy: PrivacyConfig, steps: int) -> float:
    """By the inequality of Cauchy and Schwarz, whatever the gradients are, noise included.

    ``|m_t| / sqrt(v_t) <= (1 − β1) / sqrt(1 − β2) · sqrt(Σ_i (β1² / β2)^i)``, i below t; then the corrections of both moments.
    """
    ratio = BETA1**2 / BETA2
    return sum(
        (1 - BETA1) / math.sqrt(1 - BETA2) * math.sqrt((1 - ratio**t) / (1 - ratio)) * math.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        for t in range(1, steps + 1)
    )


def _sgd(train: TrainConfig, privacy: PrivacyConfig, steps: int) -> float | None:
    longest = _noised(train, privacy) if train.clip_norm is None else train.clip_norm
    return None if longest is None else steps * longest / (1 - train.momentum)


def _noised(train: TrainConfig, privacy: PrivacyConfig) -> float | None:
    """Return the largest value of a noised mean of clipped gradients: of a batch of twice the expected size, and of the noise's tail."""
    moves = privacy.clipping == "adaptive" or train.prox_mu or train.preconditioner != "none"
    if privacy.unit != "example" or privacy.noise_multiplier is None or moves:
        return None
    return privacy.max_grad_norm * (2 + TAIL * privacy.noise_multiplier / train.batch_size)


def _unbounded(train: TrainConfig, privacy: PrivacyConfig, steps: int) -> None:
    """Moments in 8 bits are rounded, and a step with them has no bound that was proved."""


_BY_OPTIMIZER: Mapping[str, Callable[[TrainConfig, PrivacyConfig, int], float | None]] = {
    "adamw": _adamw,
    "adamw8bit": _unbounded,
    "sgd": _sgd,
}
