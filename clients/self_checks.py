"""What private training must be, checked in a client's first round: a mistake here leaves a useless model, or one that is not private.

Each check that fails has a code of its own (:mod:`fedsb.privacy.codes`), for a reply may not carry text that comes from data. Nor may a
code tell of them, for no noise covers it: sound code passes with any data, however gradients cancel, vanish or overflow. What could not be
told from that is held on made-up gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from clients.clipping import Clipping, FlatClipping
from clients.mechanism_checks import Bounds, Noises, hold_mechanism
from fedsb.adapters.quantised import stored
from fedsb.core.state import HEAD, Name
from fedsb.models.adapted import AdaptedModel
from fedsb.privacy.accounting import Entry
from fedsb.privacy.codes import SelfCheckFailed

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FirstRound:
    """Watches a round.

    Args:
        adapted: the model in training.
        trained: its trained tensors, or those of one that shares its frozen weights.
        optimizer: the private optimiser over its trained tensors.
        clipping: what it was made with.
        charged: what the ledger holds for the round: rate, noise and steps are those of this entry, or the claim is not true.

    Raises:
        SelfCheckFailed: ``bound``, ``clipped_sum``, ``steps`` or ``noise``: the optimiser does not clip, or adds no noise, as it should.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        trained: Mapping[Name, nn.Parameter],
        optimizer: FlatClipping,
        *,
        clipping: Clipping,
        charged: Entry,
    ) -> None:
        hold_mechanism(optimizer, clipping, charged.noise_multiplier)
        self._adapted = adapted
        self._trained = trained
        self._optimizer = optimizer
        self._charged = charged
        self._base = fingerprint(adapted)
        self._watching = True
        self._noises = Noises(optimizer, charged.noise_multiplier)
        self._bounds = Bounds(optimizer)
        self._pulled = False
        optimizer.observers.append(self._noise_added)

    def depends(self, output: Callable[[], Tensor]) -> None:
        """Hold that the model's output depends on every trained tensor, and that these are what the optimiser moves.

        Args:
            output: computes the model's output on an example long enough for its tokens to attend to each other.

        Raises:
            SelfCheckFailed: ``dependence``.
        """
        owned = {id(p) for p in self._optimizer.params}
        if any(id(p) not in owned for p in self._trained.values()):
            raise SelfCheckFailed("dependence")
        gradients = _probe(self._adapted.model, output, list(self._live().values()))
        if any(g is None or not bool(g.any()) for g in gradients):
            raise SelfCheckFailed("dependence")

    def pulled(self, examples: int) -> None:
        """Note, after a backward pass, that it was of so many examples, and whether they have a gradient."""
        self._bounds.given(examples)
        self._pulled = self._pulled or any(p.grad is not None and bool(p.grad.any()) for p in self._trained.values())

    def accumulated(self) -> None:
        """Hold that a batch which does not end its step adds no more than its examples may.

        Raises:
            SelfCheckFailed: ``bound``.
        """
        self._bounds.added(last=False)

    def stepped(self) -> None:
        """Hold, once a step is taken, that the base did not move, until one was taken on a gradient.

        Raises:
            SelfCheckFailed: ``base``.
        """
        if self._watching and fingerprint(self._adapted) != self._base:
            raise SelfCheckFailed("base")
        self._watching = not self._pulled

    def finish(self, *, steps: int, sampler: Any) -> None:
        """Hold at the end of the round that what was done is what was charged.

        Raises:
            SelfCheckFailed: ``steps``, ``noise`` or ``sampler``.
        """
        if not steps == self._noises.steps == self._charged.steps:
            raise SelfCheckFailed("steps")
        self._noises.finish()
        # A subclass may draw as it likes.
        if type(sampler) is not UniformWithReplacementSampler or sampler.sample_rate != self._charged.sampling_rate:
            raise SelfCheckFailed("sampler")

    def _noise_added(self) -> None:
        self._bounds.added(last=True)
        self._noises.add()

    def _live(self) -> dict[Name, nn.Parameter]:
        """Return the trained tensors that can have a gradient: a factor beside one that is zero (LoRA's A at the start) has none."""
        return {name: p for name, p in self._trained.items() if name.role == HEAD or self._partners_move(name)}

    def _partners_move(self, name: Name) -> bool:
        layer = self._adapted.layers[name.module]
        partners = (Name(name.module, role) for role in layer.spec.factors if role != name.role)
        return all(bool(self._trained.get(partner, layer.weight_of(partner.role)).any()) for partner in partners)


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
    frozen = [t.detach() for p in adapted.model.parameters() if id(p) not in trained for t in stored(p)]
    return tuple(int(t.view(INTEGERS[t.element_size()]).sum(dtype=torch.int64)) for t in frozen)
