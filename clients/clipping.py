"""Clip per-example gradients, sum them, add Gaussian noise: Opacus' optimiser with the three ways to clip.

Opacus gives each parameter ``grad_sample`` (b, …). Here an example's gradients are measured in float64 whatever they were computed in
(a norm rounded to bfloat16 would let 0.4% more than C through, and one summed up in float32 over a large head more than
:data:`MARGIN`), and one that is not finite contributes nothing: a single broken example must neither spoil the sum nor show in it.
Sums of :data:`PIECE` of them are added up in float64, and the noise to that: a sum that is rounded first moves by more than C where it is
long enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedsb.privacy.adaptive import MARGIN, moved_norm, sum_multiplier

# Smaller factors are no normal numbers in float32, and would be rounded by more than the margin.
SMALLEST = float(torch.finfo(torch.float32).tiny)
PIECE = 64  # gradients that are summed in float32


@dataclass(frozen=True)
class Clipping:
    """How gradients are clipped and how much noise their sum gets.

    Attributes:
        kind: key of :data:`CLIPPINGS`.
        max_norm: C; with ``adaptive``, where it starts.
        noise_multiplier: σ of the whole release in units of its sensitivity, as the ledger has it.
        quantile, quantile_lr, count_noise: γ, η and σ_b of adaptive clipping (Andrew et al. 2021, arXiv:1905.03871).

    Raises:
        UserError: σ_b is too small for σ: known before anything is charged.
    """

    kind: str
    max_norm: float
    noise_multiplier: float
    quantile: float = 0.5
    quantile_lr: float = 0.2
    count_noise: float = 5.0

    def __post_init__(self) -> None:
        if self.kind == "adaptive":
            sum_multiplier(self.noise_multiplier, self.count_noise)


@dataclass
class ClippingLog:
    """What the clipping saw, for the client's own eyes: it is a function of the data that no noise covers.

    What is counted stays where it is computed until somebody asks: a GPU is not waited for in every step.
    """

    clipped: Tensor | int = 0
    examples: int = 0
    ratios: list[Tensor] = field(default_factory=list)

    @property
    def clip_rate(self) -> float:
        """Share of the examples whose gradient was longer than C."""
        return int(self.clipped) / max(1, self.examples)

    @property
    def signal_to_noise(self) -> float:
        """Mean over the steps of ``‖clipped sum‖ / E‖noise‖``."""
        return sum(map(float, self.ratios)) / max(1, len(self.ratios))


class FlatClipping(DPOptimizer):  # type: ignore[misc]
    """One norm over all trained tensors, head included (Abadi et al. 2016, arXiv:1607.00133).

    Args:
        optimizer: the optimiser that takes the noised step.
        clipping: bound and noise.
        expected_batch: q n, what the noised sum is divided by, whatever was drawn.
        generator: draws the noise; on the parameters' device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipping: Clipping, *, expected_batch: float, generator: torch.Generator) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=clipping.noise_multiplier,
            max_grad_norm=clipping.max_norm,
            expected_batch_size=expected_batch,
            generator=generator,
        )
        self.log = ClippingLog()
        # How many rows at the end of the batch are no examples: their gradients are zero, and they are not counted.
        self.blank = 0
        # The step's sums before they are rounded to ``summed_grad``, which has its parameter's precision.
        self._sums: list[Tensor] = []
        self.observers: list[Callable[[], None]] = [self._note_signal]
        # Called after the noise is added, while ``summed_grad`` still is without it.
        self.attach_step_hook(lambda _: [observe() for observe in self.observers])

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients of the physical batch to ``summed_grad``."""
        samples = [self._get_flat_grad_sample(p).to(torch.float32).flatten(1) for p in self.params]
        norms = torch.stack([torch.linalg.vector_norm(sample, dim=1, dtype=torch.float64) for sample in samples])
        usable = norms.isfinite().all(dim=0)
        norms = torch.where(usable, norms, 0.0)
        factors = self.factors(norms)
        factors = torch.where(usable & (factors >= SMALLEST), factors, 0.0)
        counted = norms.shape[1] - self.blank
        usable[counted:] = False
        factors[:, counted:] = 0.0
        self.log.examples += counted
        self.log.clipped = (factors[:, :counted] < 1).any(dim=0).sum() + self.log.clipped
        if self.params[0].summed_grad is None:
            self._sums = [torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for p in self.params]
        # Of a GPU it is not asked: its answer would be waited for.
        zeroed = self.blank or usable.device.type != "cpu" or not bool(usable.all())
        for p, total, sample, factor in zip(self.params, self._sums, samples, factors.float(), strict=True):
            if zeroed:
                sample = torch.where(usable[:, None], sample, 0.0)
            for share, piece in zip(factor.split(PIECE), sample.split(PIECE), strict=True):
                total += (share @ piece).view_as(p)
            p.summed_grad = total.to(p.dtype)

    def add_noise(self) -> None:
        """Leave the noised sums in ``grad``: they are rounded to its precision once the noise is in them."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for p, total in zip(self.params, self._sums, strict=True):
            if deviation:
                total = total + deviation * torch.randn(total.shape, generator=self.generator, dtype=total.dtype, device=total.device)
            p.grad = total.to(p.dtype)

    def factors(self, norms: Tensor) -> Tensor:
        """Return what to multiply each gradient with, (tensors, b), from its norms, (tensors, b)."""
        joint: Tensor = MARGIN * self.max_grad_norm / norms.norm(dim=0).clamp(min=1e-30)
        return joint.clamp(max=1.0).expand_as(norms)

    def _note_signal(self) -> None:
        signal = torch.stack([p.summed_grad.double().square().sum() for p in self.params]).sum().sqrt()
        noise = self.noise_multiplier * self.max_grad_norm * math.sqrt(sum(p.numel() for p in self.params))
        self.log.ratios.append(signal / noise if noise else torch.full_like(signal, math.inf))


class PerLayerClipping(FlatClipping):
    """``C / √L`` for each of the L trained tensors, so that the joint norm is at most C and the ledger's entry the same."""

    def factors(self, norms: Tensor) -> Tensor:
        """See :meth:`FlatClipping.factors`."""
        each: Tensor = MARGIN * self.max_grad_norm / math.sqrt(len(norms)) / norms.clamp(min=1e-30)
        return each.clamp(max=1.0)


class AdaptiveClipping(FlatClipping):
    """C follows a quantile of the norms (Andrew et al. 2021, arXiv:1905.03871).

    A step also releases how many norms lie below C, counted from −1/2, with noise σ_b. The gradients get
    ``σ_Δ = (σ⁻² − (2 σ_b)⁻²)^(−1/2)`` then, so that the two together cost one release with σ. The count is divided by the expected
    batch: the true size is private.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipping: Clipping, *, expected_batch: float, generator: torch.Generator) -> None:
        super().__init__(optimizer, clipping, expected_batch=expected_batch, generator=generator)
        self.noise_multiplier = sum_multiplier(clipping.noise_multiplier, clipping.count_noise)
        self._settings = clipping
        self._count = 0.0

    def factors(self, norms: Tensor) -> Tensor:
        """See :meth:`FlatClipping.factors`; also counts the norms that lie below C.

        A gradient of zero counts for nothing, as an example that is not there: zeroing one out moves the count by 1/2, not by 1.
        """
        joint = norms[:, : norms.shape[1] - self.blank].norm(dim=0)
        there = joint > 0
        self._count += int((there & (joint <= self.max_grad_norm)).sum()) - 0.5 * int(there.sum())
        return super().factors(norms)

    def pre_step(self, closure: Callable[[], float] | None = None) -> Any:
        """Clip, add noise, and move C for the next step."""
        ready = super().pre_step(closure)
        if ready:
            self._move()
        return ready

    def _move(self) -> None:
        s = self._settings
        noise = torch.randn((), generator=self.generator, dtype=torch.float64, device=self.generator.device)
        share = 0.5 + (self._count + s.count_noise * float(noise)) / self.expected_batch_size
        self.max_grad_norm: float = moved_norm(float(self.max_grad_norm), -s.quantile_lr * (min(1.0, max(0.0, share)) - s.quantile))
        self._count = 0.0


CLIPPINGS: dict[str, type[FlatClipping]] = {"flat": FlatClipping, "per_layer": PerLayerClipping, "adaptive": AdaptiveClipping}
