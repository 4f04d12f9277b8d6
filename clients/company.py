"""What an example says is its own: its output and its gradient are the same alone and beside others, or clipping bounds nothing.

A law and no list of models: two made-up examples, one short and one of full length, are computed alone, by plain autograd, and together,
by whatever collects per-example gradients in training. Nothing here depends on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from clients.physical import Asked
from fedsb.core.state import Name
from fedsb.data import made_row
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.stack.dropout import undisturbed
from fedsb.tasks.task import Batch, Task

# The most that output and gradient may differ, relative to their norm: float32 leaves 1e-5 at the most, and mixing moves whole per cents.
TOLERANCE, ROUGH_TOLERANCE = 1e-4, 2e-2
# An output, and a tensor's share of the whole gradient, that are next to nothing are rounding.
LEAST_OUTPUT, LEAST_SHARE = 1e-2, 1e-3
SHORT, WORDS = 6, 64


class Company:
    """Two made-up examples, and what each of them says alone.

    Args:
        adapted: the model in training.
        task: gives the loss of each example.
        trained: its trained tensors, or those of one that shares its frozen weights.
        forward: gives the outputs with the values of ``trained``.
        like: an example, for its columns alone.
        length: tokens that every example is padded to.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        task: Task,
        trained: Mapping[Name, nn.Parameter],
        forward: Callable[[Batch], Tensor],
        *,
        like: Mapping[str, Any],
        length: int,
    ) -> None:
        self._adapted, self._task, self._trained, self._forward, self._length = adapted, task, trained, forward, length
        self._made = [made_up(adapted, like, count) for count in (min(SHORT, (length + 1) // 2), length)]
        wide = all(p.dtype in (torch.float32, torch.float64) for p in adapted.model.parameters())
        self._tolerance = TOLERANCE if wide else ROUGH_TOLERANCE
        self._own: list[list[Tensor]] = []

    @property
    def asked(self) -> Asked:
        """Both examples, to be computed together as those of the client are."""
        return Asked(self._made, probe=True)

    def longest(self) -> Batch:
        """Return a batch of the example of full length."""
        return self._batch(self._made[-1:])

    def batches(self) -> tuple[list[tuple[Batch, int]], list[tuple[Batch, int]]]:
        """Return the examples one by one and together, each batch with how many it has."""
        return [(self._batch([made]), 1) for made in self._made], [(self._batch(self._made), len(self._made))]

    def hold_outputs(self) -> None:
        """Hold that outputs are the same alone and together, evaluating and training; keep the gradients that each example has alone.

        Raises:
            SelfCheckFailed: ``company``.
        """
        with moved(self._trained.values()):
            for training in (False, True):
                with _mode(self._adapted.model, training=training), undisturbed():
                    self._hold_outputs()
            with _mode(self._adapted.model, training=True), undisturbed():
                self._own = [self._gradients([made]) for made in self._made]

    def hold_gradients(self) -> None:
        """Hold, once ``asked`` was computed, that each example's gradient in ``grad_sample`` is the one that it has alone.

        Raises:
            SelfCheckFailed: ``company``.
        """
        sampled = [p.grad_sample.detach() for p in self._trained.values()]  # type: ignore[attr-defined]
        for i, own in enumerate(self._own):
            least = LEAST_SHARE * _norm(own)
            for found, wanted in zip(sampled, own, strict=True):
                self._hold(found[i], wanted, least)

    def is_kept(self, backward: Callable[[Asked], Tensor]) -> bool:
        """Tell whether what computes gradients gives each example its own."""
        try:
            with self.moved():
                backward(self.asked)
                self.hold_gradients()
        except SelfCheckFailed:
            return False
        return True

    def moved(self) -> AbstractContextManager[None]:
        """Return the context in which ``asked`` is to be computed: see :func:`moved`."""
        return moved(self._trained.values())

    @torch.no_grad()
    def _hold_outputs(self) -> None:
        alone = [self._forward(self._batch([made])) for made in self._made]
        for made, out in zip(self._made, alone, strict=True):
            _make_wrong(made, out)
        for order in (slice(None), slice(None, None, -1)):
            together = self._forward(self._batch(self._made[order]))
            for found, wanted, made in zip(together, alone[order], self._made[order], strict=True):
                read = len(made["input_ids"]) if wanted.ndim > 2 else None  # what stands at padding is nobody's
                self._hold(found[:read], wanted[0][:read], LEAST_OUTPUT)

    def _gradients(self, examples: Sequence[dict[str, Any]]) -> list[Tensor]:
        batch = self._batch(examples)
        loss = self._task.losses(self._forward(batch), batch).sum()
        return list(torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True, materialize_grads=True))

    def _batch(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return collate(examples, self._adapted, self._task, self._length)

    def _hold(self, found: Tensor, wanted: Tensor, least: float) -> None:
        usable = wanted.isfinite()
        difference = _norm([torch.where(usable, found.double() - wanted.double(), 0.0)])
        # Not "above": a difference that is no number is one.
        if not torch.equal(usable, found.isfinite()) or not difference <= self._tolerance * max(_norm([wanted]), least):
            raise SelfCheckFailed("company")


def made_up(adapted: AdaptedModel, like: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return an example of ``count`` tokens that says nothing of the data: different words between what the tokenizer puts around a text.

    Args:
        adapted: the model; encoder-decoders read their output at the one end of a text.
        like: an example, for its columns, and for how many ends the frame of a text has.
        count: tokens.
    """
    assert adapted.tokenizer is not None
    tokens = made_row(adapted.tokenizer, count, WORDS) if callable(adapted.tokenizer) else _bare_row(adapted, count)
    settings: Any = adapted.model.config
    if settings.is_encoder_decoder:
        # Such a classifier refuses a batch whose rows differ in that, and a pair of texts has two or three.
        end = settings.eos_token_id
        more = max(0, min(like["input_ids"].count(end) - tokens.count(end), count - 1))
        tokens[-1 - more : -1] = [end] * more
    fill = {"input_ids": tokens, "attention_mask": [1] * len(tokens), "learnt": [1] * len(tokens)}
    return {key: type(like[key])(0) if key == "target" else list(fill.get(key, [0] * len(tokens))) for key in like}


def _bare_row(adapted: AdaptedModel, count: int) -> list[int]:
    """Return a text for a model whose tokeniser does no more than pad: texts come as tokens then, and have no frame."""
    tokenizer, embeddings = cast(Any, adapted.tokenizer), cast(Any, adapted.model).get_input_embeddings()
    words = [i for i in range(min(embeddings.num_embeddings, WORDS + 1)) if i != tokenizer.pad_token_id] or [0]
    return [words[i % len(words)] for i in range(count)]


def _make_wrong(made: dict[str, Any], out: Tensor) -> None:
    """Give an example a target that the model is wrong about: the gradient of one that it knows is rounding."""
    if "target" in made:
        made["target"] = float(out.mean()) + 1.0 if isinstance(made["target"], float) else int(out.argmin())


@contextmanager
def moved(trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Give tensors that are all zero other values inside the block: beside LoRA's zero B the gradients of A would say nothing."""
    zero = [p for p in trained if not bool(p.any())]
    draw = torch.Generator().manual_seed(0)
    for p in zero:
        p.data.copy_(0.02 * torch.randn(p.shape, generator=draw))
    try:
        yield
    finally:
        for p in zero:
            p.data.zero_()


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Let the model train or evaluate inside the block; whatever it counts is as before afterwards."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    try:
        yield
    finally:
        model.eval()
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([torch.linalg.vector_norm(t.nan_to_num(), dtype=torch.float64) for t in tensors]).norm()) if tensors else 0.0
