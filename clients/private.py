"""Example-level DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on one client, through Opacus.

Every step draws a Poisson sample, clips each example's gradient over all trained tensors (head included), sums, adds noise (on an empty
sample too) and divides by the expected sample size. The loss is summed over examples, each a function of its own example alone: a mean
over a batch's tokens would let one example change the others' gradients, and the sensitivity would not be C.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from clients.self_checks import FirstStep
from fedsb.models import AdaptedModel
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.randomness import Streams
from fedsb.rng import torch_stream
from fedsb.schema import TrainConfig
from fedsb.tasks import Task
from fedsb.training import OPTIMIZERS, Site, autocast, collate, rate_factor

Features = Sequence[dict[str, Any]]


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


class PoissonSampler(Sampler[list[int]]):
    """Opacus' Poisson sampler, each sample in order of length, so that what is padded together is of like length."""

    def __init__(self, lengths: Sequence[int], rate: float, steps: int, generator: torch.Generator) -> None:
        self.poisson = UniformWithReplacementSampler(num_samples=len(lengths), sample_rate=rate, generator=generator, steps=steps)
        self._lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        for drawn in self.poisson:
            yield sorted(drawn, key=lambda i: (self._lengths[i], i))

    def __len__(self) -> int:
        return len(self.poisson)


def private_fit(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    train: TrainConfig,
    site: Site,
    mechanism: Mechanism,
    streams: Streams,
    check: bool = False,
) -> PrivateFit:
    """Train factors and head of ``adapted`` in place with differential privacy.

    Args:
        adapted: holds the server's state when called and the client's afterwards.
        task: gives the loss of each example.
        features: tokenised examples of the client.
        train: optimiser, schedule, lengths; its ``clip_norm`` and ``prox_mu`` act on the noised gradient.
        site: client, round and seed.
        mechanism: what is released.
        streams: draws noise and samples.
        check: run the self-checks of :mod:`clients.self_checks` on the first step that has an example.

    Raises:
        SelfCheckFailed: training is not what the ledger says it is.
    """
    parameters = list(adapted.trainable().values())
    anchors = [p.detach().clone() for p in parameters] if train.prox_mu else []
    optimizer = CLIPPINGS[mechanism.clipping.kind](
        OPTIMIZERS[train.optimizer](parameters, train),
        mechanism.clipping,
        expected_batch=mechanism.sampling_rate * len(features),
        generator=streams.noise,
    )
    sampler = PoissonSampler([len(f["input_ids"]) for f in features], mechanism.sampling_rate, mechanism.steps, streams.sampling)
    with (
        _sampled_gradients(adapted.model, mechanism.functorch) as hooks,
        torch_stream(site.seed, "dropout", site.client, site.round),
    ):
        first = FirstStep(adapted, optimizer, hooks) if check else None
        loop = _Loop(adapted, task, train, site, mechanism.steps, optimizer, anchors, first)
        # The loader's own draw of a base seed would move the stream of the dropout.
        loader: DataLoader[Any] = DataLoader(features, batch_sampler=sampler, collate_fn=list, generator=torch.Generator())  # type: ignore[arg-type]
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=mechanism.max_batch, optimizer=optimizer) as batches:
            for batch in batches:
                loop.physical(batch)
    if first is not None:
        first.finish(steps=loop.steps, mechanism_steps=mechanism.steps, sampler=sampler.poisson, rate=mechanism.sampling_rate)
    return PrivateFit(loop.steps, loop.diagnostics())


@contextmanager
def _sampled_gradients(model: nn.Module, functorch: bool) -> Iterator[GradSampleHooks]:
    """Let every trained parameter collect per-example gradients inside the block."""
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", force_functorch=functorch)
    model.train()
    try:
        with warnings.catch_warnings():
            # True of the first adapted layer, whose input has no gradient, and harmless: only the output's gradient is used.
            warnings.filterwarnings(
                "ignore", message="Full backward hook is firing when gradients are computed with respect to module outputs"
            )
            yield hooks
    finally:
        model.eval()
        hooks.cleanup()


class _Loop:
    """The steps of a round."""

    def __init__(
        self,
        adapted: AdaptedModel,
        task: Task,
        train: TrainConfig,
        site: Site,
        planned: int,
        optimizer: FlatClipping,
        anchors: list[Tensor],
        first: FirstStep | None,
    ) -> None:
        self._adapted, self._task, self._train, self._site = adapted, task, train, site
        self._planned, self._optimizer, self._anchors, self._first = planned, optimizer, anchors, first
        self.steps = 0
        self._loss = 0.0

    def physical(self, examples: Features) -> None:
        """Take a physical batch in; the last one of a sample makes the step."""
        self._optimizer.zero_grad(set_to_none=True)
        if examples:
            self._backward(examples)
        else:
            for p in self._optimizer.params:
                p.grad_sample = p.new_zeros((0, *p.shape))
        if self._optimizer.pre_step():
            self._step(bool(examples))

    def _backward(self, examples: Features) -> None:
        batch = collate(examples, self._adapted, self._task)
        with autocast(self._train, self._adapted.device):
            losses = self._task.losses(self._task.forward(self._adapted.model, batch), batch)
        total = losses.sum()
        total.backward()  # type: ignore[no-untyped-call]
        self._loss += float(total.detach())
        for p in self._optimizer.params:
            if p.grad_sample is None or len(p.grad_sample) != len(examples):
                # A layer that folds tokens into its first dimension, or one that the loss does not reach.
                raise SelfCheckFailed("examples")
        if self._first is not None:
            self._first.before(lambda: self._task.forward(self._adapted.model, batch))

    def _step(self, filled: bool) -> None:
        share = rate_factor(
            self._train, step=self.steps, steps=self._planned, round_number=self._site.round, num_rounds=self._site.num_rounds
        )
        for group in self._optimizer.param_groups:
            group["lr"] = self._train.lr * share
        parameters = self._optimizer.params
        for parameter, anchor in zip(parameters, self._anchors, strict=False):
            parameter.grad.add_(parameter.detach() - anchor, alpha=self._train.prox_mu)
        if self._train.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._train.clip_norm)
        self._optimizer.original_optimizer.step()
        self.steps += 1
        if self._first is not None and filled:
            self._first.after()

    def diagnostics(self) -> dict[str, float]:
        log = self._optimizer.log
        return {
            "loss": self._loss / max(1, log.examples),
            "clip_rate": log.clip_rate,
            "signal_to_noise": log.signal_to_noise,
            "clip_norm": float(self._optimizer.max_grad_norm),
        }
