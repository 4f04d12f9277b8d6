"""What private training must be, checked on its first step: a mistake here leaves a useless model, or one that is not private.

Each check that fails has a code of its own (:mod:`fedsb.privacy.codes`), for a reply may not carry text that comes from data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from clients.clipping import FlatClipping
from fedsb.models import AdaptedModel
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.state import HEAD, Name


class FirstStep:
    """Watches the first step that has an example.

    Args:
        adapted: the model in training.
        optimizer: the private optimiser over its trained tensors.
        hooks: what collects the per-example gradients; off during the probe.
    """

    def __init__(self, adapted: AdaptedModel, optimizer: FlatClipping, hooks: GradSampleHooks) -> None:
        self._adapted = adapted
        self._optimizer = optimizer
        self._hooks = hooks
        self._base = fingerprint(adapted)
        self._watching = True
        self._noised = 0
        optimizer.observers.append(self._noise_added)

    def before(self, output: Callable[[], Tensor]) -> None:
        """Hold that the model's output depends on every trained tensor, and that these are what the optimiser moves.

        Raises:
            SelfCheckFailed: ``dependence``.
        """
        if not self._watching:
            return
        owned = {id(p) for p in self._optimizer.params}
        live = self._live()
        if any(id(p) not in owned for p in self._adapted.trainable().values()):
            raise SelfCheckFailed("dependence")
        self._hooks.disable_hooks()
        gradients = _probe(self._adapted.model, output, list(live.values()))
        self._hooks.enable_hooks()
        if any(g is None or not bool(g.any()) for g in gradients):
            raise SelfCheckFailed("dependence")

    def after(self) -> None:
        """Hold, once the step is taken, that the base did not move.

        Raises:
            SelfCheckFailed: ``base``.
        """
        if self._watching and fingerprint(self._adapted) != self._base:
            raise SelfCheckFailed("base")
        self._watching = False

    def finish(self, *, steps: int, mechanism_steps: int, sampler: object, rate: float) -> None:
        """Hold at the end of the round that what was done is what was charged.

        Raises:
            SelfCheckFailed: ``steps`` or ``sampler``.
        """
        if not steps == self._noised == mechanism_steps:
            raise SelfCheckFailed("steps")
        if not isinstance(sampler, UniformWithReplacementSampler) or sampler.sample_rate != rate:
            raise SelfCheckFailed("sampler")

    def _noise_added(self) -> None:
        """Hold that the clipped sum before noise is not zero for any trained tensor that can have a gradient."""
        self._noised += 1
        if self._watching and self._optimizer.log.examples:
            for p in self._live().values():
                total: Tensor | None = p.summed_grad  # type: ignore[attr-defined]
                if total is None or not bool(total.any()):
                    raise SelfCheckFailed("clipped_sum")

    def _live(self) -> dict[Name, nn.Parameter]:
        """Return the trained tensors that can have a gradient: a factor beside one that is zero (LoRA's A at the start) has none."""
        return {name: p for name, p in self._adapted.trainable().items() if name.role == HEAD or self._partners_move(name)}

    def _partners_move(self, name: Name) -> bool:
        layer = self._adapted.layers[name.module]
        return all(bool(layer.factor(role).weight.any()) for role in layer.spec.factors if role != name.role)


def _probe(model: nn.Module, output: Callable[[], Tensor], parameters: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a fixed random combination of the outputs (their plain sum is constant where they are logits)."""
    model.eval()
    try:
        out = output()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, torch.float32)
        found: tuple[Tensor | None, ...] = torch.autograd.grad((out.float() * weights).sum(), parameters, allow_unused=True)
        return found
    finally:
        model.train()


def fingerprint(adapted: AdaptedModel) -> tuple[float, ...]:
    """Return what changes where a frozen weight does: sums and absolute sums of every one, in float64."""
    frozen = [p.detach() for p in adapted.model.parameters() if not p.requires_grad]
    with torch.no_grad():
        return tuple(float(t) for p in frozen for t in (p.sum(dtype=torch.float64), p.abs().sum(dtype=torch.float64)))
