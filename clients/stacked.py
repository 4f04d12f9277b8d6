"""Teach several clients' lessons at once: in each pass the examples that all of them ask for next go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor

from clients.physical import Asked
from clients.sampling import check_sampled, finite_sum, nothing_sampled, padded_length, sampled_gradients
from fedsb.config.schema import TrainConfig
from fedsb.core.errors import UserError
from fedsb.models.collating import autocast, collate
from fedsb.models.fit import Features, Lesson
from fedsb.stack.dropout import undisturbed
from fedsb.stack.stack import Part, Stack
from fedsb.tasks.task import Batch, Task

Losses = Callable[[Tensor, Batch], Tensor]


def taught_together(
    stack: Stack, task: Task, lessons: Mapping[int, Lesson[Any]], *, train: TrainConfig, private: bool = False
) -> dict[int, Any]:
    """Give lessons side by side; one that is over drops out of the passes.

    Args:
        stack: whose members the lessons train.
        task: gives the loss.
        lessons: by member of the stack.
        train: mixed precision.
        private: whether the lessons ask for per-example gradients.

    Returns:
        By member what its lesson ended with, or the exception that it raised.

    Raises:
        UserError: the model draws random numbers that cannot be told apart by client.
    """
    if private and any(type(owner.module) not in GradSampleHooks.GRAD_SAMPLERS for owner in stack.trained):
        raise UserError("a trained layer has no per-example gradients of its own in Opacus; set runtime.stack=1")
    results: dict[int, Any] = {}
    asked: dict[int, Features] = {}
    sampling: AbstractContextManager[None] = sampled_gradients(stack.adapted.model) if private else nullcontext()
    one_pass = _private_pass if private else _plain_pass
    stack.adapted.model.train()
    try:
        with stack.laid(), sampling:
            waiting: dict[int, Tensor | None] = dict.fromkeys(lessons)
            while waiting:
                for member, loss in waiting.items():
                    _go_on(member, lessons[member], loss, asked, results)
                _probe(stack, task, lessons, asked, results, train)
                waiting = dict(one_pass(stack, task, asked, train)) if asked else {}
                asked = {}
    finally:
        stack.adapted.model.eval()
    return results


def _go_on(member: int, lesson: Lesson[Any], loss: Tensor | None, asked: dict[int, Features], results: dict[int, Any]) -> None:
    """Let a lesson go on until it asks for something, or ends."""
    try:
        asked[member] = lesson.send(loss)  # type: ignore[arg-type]
    except StopIteration as end:
        results[member] = end.value
    except Exception as error:  # its own: the others go on
        results[member] = error


def _probe(
    stack: Stack, task: Task, lessons: Mapping[int, Lesson[Any]], asked: dict[int, Features], results: dict[int, Any], train: TrainConfig
) -> None:
    """Compute made-up examples first and by themselves: clients that check nothing must not fall behind those that do."""
    probes = {member: asked.pop(member) for member, examples in [*asked.items()] if isinstance(examples, Asked) and examples.probe}
    if probes:
        with undisturbed():
            losses = _private_pass(stack, task, probes, train, probe=True)
        for member, loss in losses.items():
            _go_on(member, lessons[member], loss, asked, results)


def _plain_pass(stack: Stack, task: Task, asked: Mapping[int, Features], train: TrainConfig) -> dict[int, Tensor]:
    losses, _ = _losses(stack, task, asked, autocast(train, stack.adapted.device), task.loss)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {member: loss.detach() for member, loss in losses.items()}


def _private_pass(stack: Stack, task: Task, asked: Mapping[int, Features], train: TrainConfig, *, probe: bool = False) -> dict[int, Tensor]:
    """Leave each member's per-example gradients on its own parameters: Opacus collects them on the model's."""
    found = {member: nothing_sampled(stack.members[member].values()) for member, examples in asked.items() if not examples}
    present = {member: examples for member, examples in asked.items() if examples}
    if not present:
        return found
    mixed = nullcontext() if probe else autocast(train, stack.adapted.device)
    losses, parts = _losses(stack, task, present, mixed, task.losses, length=padded_length(stack.adapted, train))
    losses = {member: each[: _counted(present[member])] for member, each in losses.items()}
    total = torch.cat(list(losses.values())).sum()
    if total.requires_grad:
        total.backward()  # type: ignore[no-untyped-call]
    _hand_out(stack, parts)
    return found | {member: finite_sum(each) for member, each in losses.items()}


def _counted(examples: Features) -> int:
    return examples.counted if isinstance(examples, Asked) else len(examples)


def _losses(
    stack: Stack,
    task: Task,
    asked: Mapping[int, Features],
    mixed: AbstractContextManager[Any],
    loss: Losses,
    *,
    length: int | None = None,
) -> tuple[dict[int, Tensor], Sequence[Part]]:
    """Return each member's loss of its own examples: of the shape, too, that they would have alone."""
    parts = [Part(member, len(examples), length or max(len(f["input_ids"]) for f in examples)) for member, examples in asked.items()]
    joint = collate([f for examples in asked.values() for f in examples], stack.adapted, task, length)
    tokens = joint["input_ids"].shape[1]
    rows = [part.rows for part in parts]
    split = {
        key: torch.split(value, rows) for key, value in joint.items() if len(value)
    }  # a language model has no targets beside its tokens
    batches = [joint | {key: pieces[i] for key, pieces in split.items()} for i in range(len(parts))]
    with stack.among(parts), mixed:
        outputs = task.forward(stack.adapted.model, joint)
        losses = {
            part.client: loss(out[:, : part.length] if out.ndim > 2 else out, {k: _cut(v, part.length, tokens) for k, v in batch.items()})
            for part, out, batch in zip(parts, torch.split(outputs, rows), batches, strict=True)
        }
    return losses, parts


def _cut(value: Tensor, length: int, tokens: int) -> Tensor:
    """Take away the padding that others needed from what runs over tokens."""
    return value[:, :length] if value.ndim > 1 and value.shape[1] == tokens else value


def _hand_out(stack: Stack, parts: Sequence[Part]) -> None:
    for owner in stack.trained:
        for attribute, name in owner.names.items():
            p = getattr(owner.module, attribute)
            check_sampled(p, sum(part.rows for part in parts))
            for part, sampled in zip(parts, torch.split(p.grad_sample, [part.rows for part in parts]), strict=True):
                stack.members[part.client][name].grad_sample = sampled  # type: ignore[attr-defined]
            p.grad_sample = None
