"""Classes that clip and add noise with one fault each, made of the real ones."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any, cast

import torch
from rows import COUNT_NOISE
from torch import Tensor

from clients.clipping import FlatClipping

Kind = type[FlatClipping]


def made(base: Kind, **methods: Any) -> Kind:
    """Return a subclass with other methods; each gets the real class first."""

    def bound(method: Any) -> Any:
        return lambda self, *args, **kwargs: method(base, self, *args, **kwargs)

    return cast(Kind, type(base.__name__, (base,), {name: bound(method) for name, method in methods.items()}))


def _scaled(base: Kind, factor: float) -> Kind:
    def init(real: Kind, self: Any, *args: Any, **kwargs: Any) -> None:
        real.__init__(self, *args, **kwargs)
        self.noise_multiplier *= factor

    return made(base, __init__=init)


def half(base: Kind) -> Kind:
    """Halve the noise."""
    return _scaled(base, 0.5)


def no_noise(base: Kind) -> Kind:
    """Forget the noise."""
    return _scaled(base, 0.0)


def _on_one(base: Kind, only: int | Container[int], share: float) -> Kind:
    chosen = (only,) if isinstance(only, int) else only

    def add_noise(real: Kind, self: Any) -> None:
        real.add_noise(self)
        for i, p in enumerate(self.params):
            if i in chosen:
                bare = p.summed_grad.view_as(p).to(p.grad.dtype)
                p.grad = bare + share * (p.grad - bare)

    return made(base, add_noise=add_noise)


def bare(base: Kind, only: int | Container[int]) -> Kind:
    """Leave some tensors without noise."""
    return _on_one(base, only, 0.0)


def weak(base: Kind, only: int | Container[int]) -> Kind:
    """Halve the noise of some tensors."""
    return _on_one(base, only, 0.5)


def same_each_step(base: Kind) -> Kind:
    """Draw the same noise in every step."""

    def add_noise(real: Kind, self: Any) -> None:
        if "kept" not in vars(self):
            self.kept = self.generator.get_state()
        self.generator.set_state(self.kept)
        real.add_noise(self)

    return made(base, add_noise=add_noise)


def same_each_tensor(base: Kind) -> Kind:
    """Take every tensor's noise from the beginning of one draw."""

    def add_noise(real: Kind, self: Any) -> None:
        real.add_noise(self)
        most = max(self.params, key=torch.numel)
        noise = (most.grad - most.summed_grad.view_as(most)).flatten()
        for p in self.params:
            p.grad = (p.summed_grad.view_as(p) + noise[: p.numel()].view_as(p)).to(p.dtype)

    return made(base, add_noise=add_noise)


def only_if_drawn(base: Kind) -> Kind:
    """Add no noise where nobody was drawn."""

    def add_noise(real: Kind, self: Any) -> None:
        before = getattr(self, "seen", 0)
        real.add_noise(self)
        self.seen = self.log.examples
        if self.seen == before:
            for p in self.params:
                p.grad = torch.zeros_like(p)

    return made(base, add_noise=add_noise)


def by_number_drawn(base: Kind) -> Kind:
    """Divide by how many were drawn."""

    def add_noise(real: Kind, self: Any) -> None:
        drawn, self.seen = self.log.examples - getattr(self, "seen", 0), self.log.examples
        real.add_noise(self)
        for p in self.params:
            p.grad *= self.expected_batch_size / max(1, drawn)

    return made(base, add_noise=add_noise)


def _clipped(base: Kind, factors: Any) -> Kind:
    return made(base, factors=factors)


def no_clipping(base: Kind) -> Kind:
    """Let every gradient through at its own length."""
    return _clipped(base, lambda real, self, norms: torch.ones_like(norms))


def head_left_out(base: Kind) -> Kind:
    """Clip the adapters' gradients by their own norm and never touch the head's, the last two tensors."""

    def factors(real: Kind, self: Any, norms: Tensor) -> Tensor:
        return torch.cat([real.factors(self, norms[:-2]), torch.ones_like(norms[-2:])])

    return _clipped(base, factors)


def ten_times(base: Kind) -> Kind:
    """Clip at ten times what the noise is scaled to."""

    def factors(real: Kind, self: Any, norms: Tensor) -> Tensor:
        return (10 * real.factors(self, norms)).clamp(max=1.0)

    return _clipped(base, factors)


def no_root(base: Kind) -> Kind:
    """Clip every layer at C."""

    def factors(real: Kind, self: Any, norms: Tensor) -> Tensor:
        return (math.sqrt(len(norms)) * real.factors(self, norms)).clamp(max=1.0)

    return _clipped(base, factors)


def twice(base: Kind) -> Kind:
    """Add every example twice."""

    def clip_and_accumulate(real: Kind, self: Any) -> None:
        kept = [p.grad_sample for p in self.params]
        real.clip_and_accumulate(self)
        for p, sample in zip(self.params, kept, strict=True):
            p.grad_sample = sample
        real.clip_and_accumulate(self)

    return made(base, clip_and_accumulate=clip_and_accumulate)


def whole_batches(base: Kind) -> Kind:
    """Clip the sum of a physical batch as if it were an example."""

    def clip_and_accumulate(real: Kind, self: Any) -> None:
        for p in self.params:
            p.grad_sample = p.grad_sample.sum(0, keepdim=True)
        real.clip_and_accumulate(self)

    return made(base, clip_and_accumulate=clip_and_accumulate)


def bare_count(base: Kind) -> Kind:
    """Publish the count as it is."""

    def move(real: Kind, self: Any) -> None:
        settings = self._settings
        self._settings = type(settings)(**{**vars(settings), "count_noise": COUNT_NOISE * 1e-9, "kind": "flat"})
        real._move(self)
        self._settings = settings

    return made(base, _move=move)


def undivided(base: Kind) -> Kind:
    """Give the sum alone the noise that is charged for sum and count."""

    def init(real: Kind, self: Any, *args: Any, **kwargs: Any) -> None:
        real.__init__(self, *args, **kwargs)
        self.noise_multiplier = self._settings.noise_multiplier

    return made(base, __init__=init)
