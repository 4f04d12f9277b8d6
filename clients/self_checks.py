"""What private training must be, checked in a client's first round: a mistake here leaves a useless model, or one that is not private.

Each check that fails has a code of its own (:mod:`fedsb.privacy.codes`), for a reply may not carry text that comes from data. A batch that
says nothing (it is empty, its texts have no gradient, or one that is not finite) decides nothing: the next one is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from clients.clipping import FlatClipping
from fedsb.models import AdaptedModel
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.state import HEAD, Name

# Below a tenth of its standard deviation the noise of so many values never lies: once in 1e13 tensors.
ENOUGH_VALUES = 16
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FirstRound:
    """Watches a round.

    Args:
        adapted: the model in training.
        optimizer: the private optimiser over its trained tensors.
    """

    def __init__(self, adapted: AdaptedModel, optimizer: FlatClipping) -> None:
        self._adapted = adapted
        self._optimizer = optimizer
        self._base = fingerprint(adapted)
        self._pulled: set[Name] = set()
        self._watching = True
        self._noised = 0
        optimizer.observers.append(self._noise_added)

    def depends(self, output: Callable[[], Tensor]) -> None:
        """Hold that the model's output depends on every trained tensor, and that these are what the optimiser moves.

        Args:
            output: computes the model's output on an example long enough for its tokens to attend to each other.

        Raises:
            SelfCheckFailed: ``dependence``.
        """
        owned = {id(p) for p in self._optimizer.params}
        if any(id(p) not in owned for p in self._adapted.trainable().values()):
            raise SelfCheckFailed("dependence")
        gradients = _probe(self._adapted.model, output, list(self._live().values()))
        if any(g is None or not bool(g.any()) for g in gradients):
            raise SelfCheckFailed("dependence")

    def pulled(self) -> None:
        """Note, after a backward pass, which trained tensors the examples have a gradient for."""
        trained = self._adapted.trainable()
        # An example that is broken in one tensor is left out of all sums.
        if all(p.grad is None or bool(p.grad.isfinite().all()) for p in trained.values()):
            self._pulled |= {name for name, p in trained.items() if p.grad is not None and bool(p.grad.any())}

    def stepped(self) -> None:
        """Hold, once a step is taken, that the base did not move.

        Raises:
            SelfCheckFailed: ``base``.
        """
        if self._watching and fingerprint(self._adapted) != self._base:
            raise SelfCheckFailed("base")
        self._watching = self._watching and not self._pulled

    def finish(self, *, steps: int, planned: int, sampler: Any, rate: float) -> None:
        """Hold at the end of the round that what was done is what was charged.

        Raises:
            SelfCheckFailed: ``steps`` or ``sampler``.
        """
        if not steps == self._noised == planned:
            raise SelfCheckFailed("steps")
        # A subclass may draw as it likes.
        if type(sampler) is not UniformWithReplacementSampler or sampler.sample_rate != rate:
            raise SelfCheckFailed("sampler")

    def _noise_added(self) -> None:
        self._noised += all(map(self._is_noised, self._optimizer.params))
        if self._watching:
            self._sum_arrived()

    def _is_noised(self, p: nn.Parameter) -> bool:
        o = self._optimizer
        noise = p.grad * o.expected_batch_size - p.summed_grad  # type: ignore[attr-defined]
        return p.numel() < ENOUGH_VALUES or float(noise.double().square().mean().sqrt()) >= 0.1 * o.noise_multiplier * o.max_grad_norm

    def _sum_arrived(self) -> None:
        """Hold that what the examples have a gradient for gets a clipped sum; two examples or more may cancel."""
        reached = {id(p): count for p, count in zip(self._optimizer.params, self._optimizer.reached, strict=True)}
        for name, p in self._live().items():
            if name in self._pulled and reached[id(p)] < 2 and not bool(p.summed_grad.any()):  # type: ignore[attr-defined]
                raise SelfCheckFailed("clipped_sum")

    def _live(self) -> dict[Name, nn.Parameter]:
        """Return the trained tensors that can have a gradient: a factor beside one that is zero (LoRA's A at the start) has none."""
        return {name: p for name, p in self._adapted.trainable().items() if name.role == HEAD or self._partners_move(name)}

    def _partners_move(self, name: Name) -> bool:
        layer = self._adapted.layers[name.module]
        return all(bool(layer.factor(role).weight.any()) for role in layer.spec.factors if role != name.role)


def _probe(model: nn.Module, output: Callable[[], Tensor], parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a fixed random combination of the outputs (their plain sum is constant where they are logits)."""
    model.eval()
    out = output()
    if not out.requires_grad:
        return (None,) * len(parameters)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device, torch.float32)
    found: tuple[Tensor | None, ...] = torch.autograd.grad((out.float() * weights).sum(), parameters, allow_unused=True)
    return found


def fingerprint(adapted: AdaptedModel) -> tuple[int, ...]:
    """Return what changes where a weight does that is not trained: the sum of its bits read as integers, NaN or not."""
    trained = {id(p) for p in adapted.trainable().values()}
    frozen = [p.detach() for p in adapted.model.parameters() if id(p) not in trained]
    return tuple(int(p.view(INTEGERS[p.element_size()]).sum(dtype=torch.int64)) for p in frozen)
