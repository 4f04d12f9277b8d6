"""Local training on one client: optimiser, schedule over the whole federated run, clipping, FedProx; no Flower, no privacy.

Optimiser state does not survive a round: a client starts each round from the server's factors with fresh moments. Nothing is read off the
model's device before the round is over: a GPU would stand idle until the host has gone on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsb.config.schema import TrainConfig
from fedsb.core.rng import global_generators, numpy_generator, torch_generator
from fedsb.core.state import Name
from fedsb.data import order
from fedsb.models.adapted import AdaptedModel
from fedsb.models.backward import Backward, checkpointed
from fedsb.models.bits_and_bytes import bitsandbytes
from fedsb.models.preconditioning import Precondition, before_steps
from fedsb.tasks.task import Task

Features = Sequence[dict[str, Any]]
Result = TypeVar("Result")
# One client's training of a round under way: it yields the examples whose gradients it needs next and is sent their loss, a detached
# scalar on the device of the model. Who computes them, for one client at a time or for several at once, is none of its business.
Lesson = Generator[Features, Tensor, Result]


@dataclass(frozen=True)
class Site:
    """Whose training it is: names the random streams and the place in the schedule."""

    seed: int
    client: str
    round: int
    num_rounds: int


class LossSum:
    """The sum of the losses of a round, in float64 where they are computed, and read once."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """Add a detached scalar."""
        self._sum = loss.double() if self._sum is None else self._sum + loss

    def total(self) -> float:
        """Return the sum; what has been computed until then is waited for."""
        return 0.0 if self._sum is None else float(self._sum)


@dataclass(frozen=True)
class FitResult:
    """Mean loss over the round's steps and the number of steps."""

    loss: float
    steps: int


def _adamw(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    # One kernel a tensor: factors are many and small, and the usual dozen of operations on each costs more than their arithmetic.
    # It goes by memory, gaps included.
    fused = all(torch.empty_like(p, device="meta").stride() == p.stride() for p in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=fused)
    optimizer.register_step_pre_hook(_align_gradients)
    return optimizer


def _align_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Lay gradients out as their parameters are: on CPUs the fused kernel goes by memory and silently mixes up the values of others."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


def _sgd(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay)


def _adamw8bit(parameters: Sequence[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = bitsandbytes("optim").AdamW8bit(parameters, lr=train.lr, weight_decay=train.weight_decay)
    return made


OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], TrainConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "sgd": _sgd,
}

# Share of the peak rate after warm-up, for a progress in [0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def rate_factor(train: TrainConfig, *, step: int, steps: int, round_number: int, num_rounds: int) -> float:
    """Return the share of ``train.lr`` at a step.

    With ``schedule_over=run`` the schedule spans all rounds of the federated run: a client that sits a round out does not lag
    behind. With ``round`` it starts anew each round.
    """
    spans = train.schedule_over == "run"
    total = steps * (num_rounds if spans else 1)
    done = step + (steps * (round_number - 1) if spans else 0)
    warm = round(train.warmup * total)
    if done < warm:
        return (done + 1) / warm
    return SCHEDULES[train.schedule]((done - warm) / max(1, total - warm))


def plan_batches(lengths: Sequence[int], train: TrainConfig, site: Site) -> list[list[int]]:
    """Return the batches of a round: ``local_epochs`` passes, or exactly ``local_steps`` batches."""
    generator = numpy_generator(site.seed, "batches", site.client, site.round)
    if train.local_steps is None:
        return [
            batch for _ in range(train.local_epochs) for batch in order(lengths, train.batch_size, bucket=train.bucket, generator=generator)
        ]
    batches: list[list[int]] = []
    while len(batches) < train.local_steps:
        batches += order(lengths, train.batch_size, bucket=train.bucket, generator=generator)
    return batches[: train.local_steps]


def fit(adapted: AdaptedModel, task: Task, features: Features, *, train: TrainConfig, site: Site) -> FitResult:
    """Train the factors and the head of ``adapted`` in place on one client's examples.

    Args:
        adapted: holds the server's state when called and the client's afterwards.
        task: gives the loss.
        features: tokenised examples, see :func:`fedsb.data.tokenise`.
        train: optimiser, schedule, lengths.
        site: client, round and seed.

    Returns:
        The mean training loss over the steps and their number.
    """
    lesson = fit_lesson(adapted.trainable(), features, train=train, site=site)

    adapted.model.train()
    with global_generators(dropout_of(site)), checkpointed(adapted.model, train.gradient_checkpointing):
        result = taught(lesson, Backward(adapted, task, train))
    adapted.model.eval()
    return result


def dropout_of(site: Site) -> torch.Generator:
    """Return the generator of a round's dropout."""
    return torch_generator(site.seed, "dropout", site.client, site.round)


def fit_lesson(trained: Mapping[Name, nn.Parameter], features: Features, *, train: TrainConfig, site: Site) -> Lesson[FitResult]:
    """Train some parameters on one client's examples; whoever teaches the lesson computes the gradients."""
    parameters, precondition = list(trained.values()), before_steps(train, trained)
    anchors = [p.detach().clone() for p in parameters] if train.prox_mu else []
    optimizer = OPTIMIZERS[train.optimizer](parameters, train)
    batches = plan_batches([len(f["input_ids"]) for f in features], train, site)
    losses = LossSum()
    for step, indices in enumerate(batches):
        share = rate_factor(train, step=step, steps=len(batches), round_number=site.round, num_rounds=site.num_rounds)
        for group in optimizer.param_groups:
            group["lr"] = train.lr * share
        optimizer.zero_grad(set_to_none=True)
        losses.add((yield [features[i] for i in indices]))
        _step(parameters, train=train, optimizer=optimizer, anchors=anchors, precondition=precondition)
    return FitResult(losses.total() / max(1, len(batches)), len(batches))


def taught(lesson: Lesson[Result], backward: Callable[[Features], Tensor]) -> Result:
    """Give a lesson alone.

    Args:
        lesson: asks for gradients.
        backward: leaves the gradients of some examples where the lesson looks for them, and returns their loss.
    """
    try:
        asked = next(lesson)
        while True:
            asked = lesson.send(backward(asked))
    except StopIteration as end:
        result: Result = end.value
        return result


def _step(
    parameters: Sequence[nn.Parameter],
    *,
    train: TrainConfig,
    optimizer: torch.optim.Optimizer,
    anchors: Sequence[Tensor],
    precondition: Precondition,
) -> None:
    # FedProx: the gradient of (mu/2)·‖x − x_server‖², added by hand to keep it out of the reported loss.
    for parameter, anchor in zip(parameters, anchors, strict=False):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=train.prox_mu)
    precondition()
    if train.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, train.clip_norm)
    optimizer.step()
