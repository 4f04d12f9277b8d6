"""Example-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on one client, through Opacus.

Every step draws a Poisson sample, clips each example's gradient over all trained tensors (head included), sums, adds noise (on an empty
sample too) and divides by the expected sample size. The loss is summed over examples, each a function of its own example alone: a mean
over a batch's tokens would let one example change the others' gradients, and the sensitivity would not be C.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opacus.grad_sample import GradSampleHooks
from opacus.utils.batch_memory_manager import BatchSplittingSampler
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn

from clients import grad_samplers  # noqa: F401  (its samplers take the place of Opacus')
from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from clients.self_checks import FirstRound
from fedsb.models import AdaptedModel
from fedsb.privacy.accounting import Entry
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.models import hold_unmixed
from fedsb.privacy.randomness import Streams
from fedsb.rng import global_generators
from fedsb.schema import TrainConfig
from fedsb.state import Name
from fedsb.tasks import Batch, Task
from fedsb.training import OPTIMIZERS, Features, Lesson, Site, autocast, collate, rate_factor, taught


@dataclass(frozen=True)
class Mechanism:
    """What a round of private training releases.

    Attributes:
        clipping: bound and noise.
        sampling_rate: q, the probability with which each example is in a step's sample.
        steps: noised optimiser steps.
        max_batch: examples in memory at once.
        functorch: compute per-example gradients with functorch and not with Opacus' hooks.
    """

    clipping: Clipping
    sampling_rate: float
    steps: int
    max_batch: int = 32
    functorch: bool = False


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
    lesson = private_lesson(
        adapted,
        adapted.trainable(),
        lambda batch: task.forward(adapted.model, batch),
        task,
        features,
        train=train,
        site=site,
        mechanism=mechanism,
        streams=streams,
        charged=charged,
    )
    parameters = list(adapted.trainable().values())
    with sampled_gradients(adapted.model, mechanism.functorch), global_generators(streams.dropout):
        return taught(lesson, lambda examples: _backward(adapted, task, examples, train=train, parameters=parameters))


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
    clipping, expected = mechanism.clipping, mechanism.sampling_rate * len(features)
    optimizer = CLIPPINGS[clipping.kind](plain, clipping, expected_batch=expected, generator=streams.noise)
    sampler = UniformWithReplacementSampler(
        num_samples=len(features), sample_rate=mechanism.sampling_rate, steps=mechanism.steps, generator=streams.sampling
    )
    first = FirstRound(adapted, trained, optimizer, charged) if charged else None
    if first is not None:
        made = collate([_made_up(features[0])], adapted, task)
        first.depends(lambda: forward(made))
    return _private_steps(optimizer, sampler, features, first, train=train, site=site, mechanism=mechanism)


def _private_steps(
    optimizer: FlatClipping,
    sampler: UniformWithReplacementSampler,
    features: Features,
    first: FirstRound | None,
    *,
    train: TrainConfig,
    site: Site,
    mechanism: Mechanism,
) -> Lesson[PrivateFit]:
    anchors = [p.detach().clone() for p in optimizer.params] if train.prox_mu else []
    steps, loss = 0, 0.0
    # Each sample in order of length, so that what is padded together is of like length.
    samples = (sorted(drawn, key=lambda i: (len(features[i]["input_ids"]), i)) for drawn in sampler)
    for indices in BatchSplittingSampler(sampler=samples, max_batch_size=mechanism.max_batch, optimizer=optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss += yield [features[i] for i in indices]
        if first is not None:
            first.pulled()
        if not optimizer.pre_step():
            continue
        share = rate_factor(train, step=steps, steps=mechanism.steps, round_number=site.round, num_rounds=site.num_rounds)
        _step(optimizer, train=train, rate=train.lr * share, anchors=anchors)
        steps += 1
        if first is not None:
            first.stepped()
    if first is not None:
        first.finish(steps=steps, sampler=sampler)
    return PrivateFit(steps, _diagnostics(optimizer, loss))


def _made_up(like: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example of the same columns that says nothing of the data: a few different tokens, as one alone attends to itself."""
    fill = {"input_ids": list(range(1, 7)), "attention_mask": [1] * 6}
    return {key: like[key] * 0 if key == "target" else fill.get(key, [0] * 6) for key in like}


@contextmanager
def sampled_gradients(model: nn.Module, functorch: bool = False) -> Iterator[None]:
    """Let every trained parameter collect per-example gradients inside the block."""
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", force_functorch=functorch)
    model.train()
    try:
        with warnings.catch_warnings():
            # True of the first adapted layer, whose input has no gradient, and harmless: only the output's gradient is used.
            warnings.filterwarnings(
                "ignore", message="Full backward hook is firing when gradients are computed with respect to module outputs"
            )
            yield
    finally:
        model.eval()
        hooks.cleanup()
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop what Opacus leaves: a forward pass that failed before its backward pass would be counted to the next one's examples."""
    kept = [(module, name) for module in model.modules() for name in ("activations", "max_batch_len")]
    kept += [(p, "summed_grad") for p in model.parameters()]  # type: ignore[misc]
    for owner, name in kept:
        if name in vars(owner):
            delattr(owner, name)


def _backward(adapted: AdaptedModel, task: Task, examples: Features, *, train: TrainConfig, parameters: Sequence[nn.Parameter]) -> float:
    """Collect the per-example gradients of a physical batch; return the sum of its finite losses."""
    if not examples:
        return nothing_sampled(parameters)
    batch = collate(examples, adapted, task)
    with autocast(train, adapted.device):
        losses = task.losses(task.forward(adapted.model, batch), batch)
    if losses.requires_grad:
        losses.sum().backward()  # type: ignore[no-untyped-call]
    for p in parameters:
        check_sampled(p, len(examples))
    return finite_sum(losses)


def nothing_sampled(parameters: Iterable[nn.Parameter]) -> float:
    """Leave the per-example gradients of an empty sample; return its loss."""
    for p in parameters:
        p.grad_sample = p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
    return 0.0


def check_sampled(p: nn.Parameter, examples: int) -> None:
    """Hold that a parameter has the gradient of each example.

    Raises:
        SelfCheckFailed: ``dependence``, or ``examples`` where a layer folds tokens into its first dimension.
    """
    found = getattr(p, "grad_sample", None)
    if found is None:
        raise SelfCheckFailed("dependence")
    if not isinstance(found, Tensor) or len(found) != examples:
        raise SelfCheckFailed("examples")


def finite_sum(losses: Tensor) -> float:
    """Return the sum of the losses that are finite."""
    return float(losses.detach().nan_to_num(0.0, 0.0, 0.0).sum())


def _step(optimizer: FlatClipping, *, train: TrainConfig, rate: float, anchors: Sequence[Tensor]) -> None:
    """Move the parameters by the noised gradient; what else acts on it does so after the noise."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    for parameter, anchor in zip(optimizer.params, anchors, strict=False):
        parameter.grad.add_(parameter.detach() - anchor, alpha=train.prox_mu)
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
