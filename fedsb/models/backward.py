"""From examples to the gradient of their mean loss: in one pass or several, compiled or not, scaled where float16 would lose it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.config.schema import TrainConfig
from fedsb.core.devices import plain
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import autocast, collate, collate_packed
from fedsb.tasks.task import Task

Features = Sequence[dict[str, Any]]
# What losses are multiplied by first; below 2**-24 a gradient in float16 is zero, and above 65504 infinite.
FLOAT16_SCALE = 2.0**15


def first_scale(model: nn.Module) -> float:
    """Return what to multiply losses by at first."""
    return FLOAT16_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0


class Backward:
    """Leaves the gradients of a batch's mean loss in the trained parameters, which have none before.

    Args:
        adapted: the model, in training.
        task: gives the loss.
        train: ``accumulation`` and ``compile``, and mixed precision.
        scale: of the loss at first, a power of two; None: :func:`first_scale`.
    """

    def __init__(self, adapted: AdaptedModel, task: Task, train: TrainConfig, scale: float | None = None) -> None:
        self._adapted, self._task, self._train = adapted, task, train
        self._model: nn.Module = adapted.compiled if train.compile else adapted.model
        self._parameters = list(adapted.trainable().values())
        self.scale = first_scale(adapted.model) if scale is None else scale

    def __call__(self, examples: Features) -> Tensor:
        """Return the mean loss, a detached scalar. Gradients that overflow are taken anew with half the scale, and it stays there."""
        while True:
            loss = self._passes(examples)
            if self.scale == 1.0 or self._unscaled():
                return loss
            self.scale /= 2.0
            for p in self._parameters:
                p.grad = None

    def _passes(self, examples: Features) -> Tensor:
        if self._train.accumulation == 1:
            return self._pass(self._batch(examples), 1.0)
        size = -(-len(examples) // self._train.accumulation)
        pieces = [examples[i : i + size] for i in range(0, len(examples), size)]
        batches = [self._batch(piece) for piece in pieces]
        terms = [self._task.terms(batch) for batch in batches]
        losses = [self._pass(batch, count / max(1, sum(terms))) for batch, count in zip(batches, terms, strict=True)]
        return torch.stack(losses).sum()

    def _batch(self, examples: Features) -> dict[str, Tensor]:
        # A compiler asks tensors for nothing and takes no others; and it would compile anew for each number of places.
        narrowed = not self._train.compile
        if self._train.packing:
            batch = collate_packed(examples, self._adapted, self._task, self._train.max_length, narrowed=narrowed)
        else:
            batch = collate(examples, self._adapted, self._task, narrowed=narrowed)
        return plain(batch) if self._train.compile else batch

    def _pass(self, batch: dict[str, Tensor], share: float) -> Tensor:
        with autocast(self._train, self._adapted.device):
            loss = self._task.loss(self._task.forward(self._model, batch), batch)
        weight = share * self.scale
        (loss if weight == 1.0 else loss * weight).backward()  # type: ignore[no-untyped-call]
        return loss.detach().double() * share

    def _unscaled(self) -> bool:
        """Take the scale out of the gradients again; tell whether all of them are finite."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # The one thing that a step cannot go on without; other precisions have no scale.
        finite = bool(torch.stack([gradient.isfinite().all().to(self._adapted.device) for gradient in gradients]).all())
        if finite:
            for gradient in gradients:
                gradient.div_(self.scale)
        return finite


@contextmanager
def checkpointed(model: Any, wanted: bool) -> Iterator[None]:
    """Let a model compute activations anew in its backward passes inside the block, and not keep them."""
    if not wanted:
        yield
        return
    # The other kind gives no gradient to layers whose inputs need none, as those of a frozen embedding.
    _switch(model, "enable")({"use_reentrant": False})
    try:
        yield
    finally:
        _switch(model, "disable")()


def _switch(model: Any, how: str) -> Callable[..., None]:
    # The second is transformers' name for it before 5.
    found: Callable[..., None] | None = getattr(model, f"activation_checkpointing_{how}", None)
    return found or getattr(model, f"gradient_checkpointing_{how}")
