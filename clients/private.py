"""Example-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on one client, through Opacus.

Every step draws a Poisson sample, clips each example's gradient over all trained tensors (head included), sums, adds noise (on an empty
sample too) and divides by the expected sample size. The loss is summed over examples, each a function of its own example alone: a mean
over a batch's tokens would let one example change the others' gradients, and the sensitivity would not be C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opacus.utils.batch_memory_manager import BatchSplittingSampler
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from clients.company import SHORT, Company, made_up
from clients.physical import Asked, Room, RoomySampler, filled
from clients.sampling import padded_length, sample_backward, sampled_gradients
from clients.self_checks import FirstRound
from fedsb.config.schema import TrainConfig
from fedsb.core.rng import global_generators
from fedsb.core.state import Name
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import OPTIMIZERS, Features, Lesson, LossSum, Site, rate_factor, taught
from fedsb.models.preconditioning import Precondition, before_steps
from fedsb.privacy.accounting import Entry
from fedsb.privacy.codes import CODES, SelfCheckFailed
from fedsb.privacy.models import hold_unmixed
from fedsb.privacy.randomness import Streams
from fedsb.privacy.sampling import drawn_rate
from fedsb.tasks.task import Batch, Task


@dataclass(frozen=True)
class Mechanism:
    """What a round of private training releases.

    Attributes:
        clipping: bound and noise.
        sampling_rate: q, the probability with which each example is in a step's sample.
        steps: noised optimiser steps.
        max_batch: examples in memory at once.
        functorch: compute per-example gradients with functorch and not with Opacus' hooks.
        constant_time: take as many physical batches of one size in every step, whatever is drawn.
    """

    clipping: Clipping
    sampling_rate: float
    steps: int
    max_batch: int = 32
    functorch: bool = False
    constant_time: bool = False


@dataclass(frozen=True)
class PrivateFit:
    """How a private round went.

    Attributes:
        steps: noised steps taken.
        diagnostics: loss, clip rate, signal-to-noise and clip norm; functions of the data that no noise covers, for the client alone.
    """

    steps: int
    diagnostics: dict[str, float]


def private_fit(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    train: TrainConfig,
    site: Site,
    mechanism: Mechanism,
    streams: Streams,
    charged: Entry | None = None,
) -> PrivateFit:
    """Train factors and head of ``adapted`` in place with differential privacy.

    Args:
        adapted: holds the server's state when called and the client's afterwards.
        task: gives the loss of each example.
        features: tokenised examples of the client.
        train: optimiser, schedule, lengths; its ``clip_norm`` and ``prox_mu`` act on the noised gradient.
        site: client and round.
        mechanism: what is released.
        streams: draws noise, samples and dropout.
        charged: what the ledger holds for this round, to run the self-checks of :mod:`clients.self_checks` against; None runs none.

    Raises:
        SelfCheckFailed: training is not what the ledger says it is.
    """
    trained = adapted.trainable()

    def forward(batch: Batch) -> Tensor:
        return task.forward(adapted.model, batch)

    def backward(asked: Features) -> Tensor:
        assert isinstance(asked, Asked)
        return sample_backward(adapted, task, asked, train=train, parameters=list(trained.values()))

    lesson = private_lesson(
        adapted, trained, forward, task, features, train=train, site=site, mechanism=mechanism, streams=streams, charged=charged
    )  # fmt: skip
    try:
        with sampled_gradients(adapted.model, mechanism.functorch), global_generators(streams.dropout):
            return taught(lesson, backward)
    except SelfCheckFailed as failed:
        if failed.code is not CODES["company"] or mechanism.functorch:
            raise
        company = Company(adapted, task, trained, forward, like=features[0], length=padded_length(adapted, train))
        company.hold_outputs()
        with sampled_gradients(adapted.model, functorch=True):
            raise (SelfCheckFailed("hooks") if company.is_kept(backward) else failed) from failed


def private_lesson(
    adapted: AdaptedModel,
    trained: Mapping[Name, nn.Parameter],
    forward: Callable[[Batch], Tensor],
    task: Task,
    features: Features,
    *,
    train: TrainConfig,
    site: Site,
    mechanism: Mechanism,
    streams: Streams,
    charged: Entry | None = None,
) -> Lesson[PrivateFit]:
    """Open a private round: whoever teaches it leaves per-example gradients, b first, in ``grad_sample`` of each parameter.

    Args:
        adapted: the model.
        trained: what is trained, of the model itself or of one that shares its frozen weights.
        forward: gives the outputs with the values of ``trained``, for the self-checks, which are made here.
        task: gives the loss of each example.
        features: tokenised examples of the client.
        train: optimiser, schedule, lengths.
        site: client and round.
        mechanism: what is released.
        streams: draws noise and samples.
        charged: what the ledger holds for this round, to run the self-checks against; None runs none.

    Raises:
        SelfCheckFailed: the model does not depend on what is trained, or mixes examples.
    """
    hold_unmixed(adapted.model)
    plain = OPTIMIZERS[train.optimizer](list(trained.values()), train)
    clipping, rate = mechanism.clipping, drawn_rate(mechanism.sampling_rate)
    expected = rate * len(features)
    optimizer = CLIPPINGS[clipping.kind](plain, clipping, expected_batch=expected, generator=streams.noise)
    sampler = UniformWithReplacementSampler(num_samples=len(features), sample_rate=rate, steps=mechanism.steps, generator=streams.sampling)
    length, precondition = padded_length(adapted, train), before_steps(train, trained)
    fill = made_up(adapted, features[0], min(SHORT, length)) if mechanism.constant_time else None
    if charged is None:
        return _private_steps(optimizer, sampler, features, fill, None, precondition, train=train, site=site, mechanism=mechanism)
    first = FirstRound(adapted, trained, optimizer, clipping=clipping, charged=charged)
    company = Company(adapted, task, trained, forward, like=features[0], length=length)
    first.depends(lambda: forward(company.longest()))
    company.hold_outputs()
    steps = _private_steps(optimizer, sampler, features, fill, first, precondition, train=train, site=site, mechanism=mechanism)
    return _checked(company, steps)


def _checked(company: Company, steps: Lesson[PrivateFit]) -> Lesson[PrivateFit]:
    """Ask for the gradients of made-up examples first, of whoever teaches the steps."""
    with company.moved():
        yield company.asked
        company.hold_gradients()
    result = yield from steps
    return result


def _private_steps(
    optimizer: FlatClipping,
    sampler: UniformWithReplacementSampler,
    features: Features,
    fill: dict[str, Any] | None,
    first: FirstRound | None,
    precondition: Precondition,
    *,
    train: TrainConfig,
    site: Site,
    mechanism: Mechanism,
) -> Lesson[PrivateFit]:
    anchors = [p.detach().clone() for p in optimizer.params] if train.prox_mu else []
    steps, losses = 0, LossSum()
    for asked in _batches(optimizer, sampler, features, fill, mechanism):
        optimizer.zero_grad(set_to_none=True)
        losses.add((yield asked))
        optimizer.blank = asked.blank
        if first is not None:
            first.pulled(asked.counted)
        if not optimizer.pre_step():
            if first is not None:
                first.accumulated()
            continue
        share = rate_factor(train, step=steps, steps=mechanism.steps, round_number=site.round, num_rounds=site.num_rounds)
        _step(optimizer, train=train, rate=train.lr * share, anchors=anchors, precondition=precondition)
        steps += 1
        if first is not None:
            first.stepped()
    if first is not None:
        first.finish(steps=steps, sampler=sampler)
    return PrivateFit(steps, _diagnostics(optimizer, losses.total()))


def _batches(
    optimizer: FlatClipping,
    sampler: UniformWithReplacementSampler,
    features: Features,
    fill: dict[str, Any] | None,
    mechanism: Mechanism,
) -> Iterable[Asked]:
    """Give the physical batches of a round, filled up to one size where their number and size may not tell what was drawn."""
    if fill is None:
        split = BatchSplittingSampler(sampler=sampler, max_batch_size=mechanism.max_batch, optimizer=optimizer)
        yield from (Asked(features[i] for i in indices) for indices in split)
        return
    room = Room.of(len(features), mechanism.sampling_rate, mechanism.max_batch)
    for indices in RoomySampler(sampler, room, optimizer):
        yield filled([features[i] for i in indices], fill, room.rows)


def _step(optimizer: FlatClipping, *, train: TrainConfig, rate: float, anchors: Sequence[Tensor], precondition: Precondition) -> None:
    """Move the parameters by the noised gradient; what else acts on it does so after the noise."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, anchor in zip(optimizer.params, anchors, strict=False):
        parameter.grad.add_(parameter.detach() - anchor, alpha=train.prox_mu)
    precondition()
    if train.clip_norm is not None:
        nn.utils.clip_grad_norm_(optimizer.params, train.clip_norm)
    optimizer.original_optimizer.step()


def _diagnostics(optimizer: FlatClipping, loss: float) -> dict[str, float]:
    log = optimizer.log
    return {
        "loss": loss / max(1, log.examples),
        "clip_rate": log.clip_rate,
        "signal_to_noise": log.signal_to_noise,
        "clip_norm": float(optimizer.max_grad_norm),
    }
