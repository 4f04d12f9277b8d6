"""A client in a gradient start under ``privacy.unit=example``: charged before it computes; a repeated request releases nothing new."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clients.company import SHORT, TOLERANCE, Company, made_up
from clients.physical import Room, filled
from clients.private_evidence import add_noise, clipped_sketch, poisson_sample
from clients.round import Upload
from clients.sampling import padded_length
from fedsb.adapters.starts import SIDES, Side, Sketch
from fedsb.config.schema import PrivacyConfig, TrainConfig
from fedsb.core.errors import UserError
from fedsb.core.state import State, squared_norm, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import collate
from fedsb.models.fit import Features
from fedsb.privacy.account import Account
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.models import hold_unmixed
from fedsb.privacy.randomness import Streams
from fedsb.tasks.task import Batch, Task

UNBOUNDED = 1e30  # a norm that nothing is clipped to


def private_evidence(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    sketch: Sketch,
    stage: str,
    number: int,
    probes: State,
    train: TrainConfig,
    privacy: PrivacyConfig,
    micro_batch: int,
    account: Account,
    streams: Streams,
) -> Upload:
    """Give one exchange of a private gradient sketch: a Poisson sample of its own, clipped, noised, charged.

    Args:
        adapted: the model at W0.
        task: gives the loss of each example.
        features: all of the client's tokenised examples.
        sketch: draws Ω where no probes came.
        stage: key of :data:`fedsb.adapters.starts.SIDES`.
        probes: as received; empty in the first exchange.
        micro_batch: examples in memory at once.
        number: of the exchange, from 0; each is a release of its own.
        train: how long a text is.
        privacy: clipping norm of a sketch, and whether its time is constant.
        account: plan and ledger.
        streams: noise and sample.

    Raises:
        BudgetExceeded: nothing was charged or computed.
        SelfCheckFailed: the model mixes examples; nothing was charged.
        UserError: the plan has no private start.
    """
    key = account.key(0, f"evidence-{number}")
    if (kept := account.kept(key)) is not None:
        return Upload(*kept)
    entry = account.plan.start
    if entry is None or number >= account.plan.exchanges:
        raise UserError("this client's plan has no such exchange of a private start")
    hold_unmixed(adapted.model)
    probes = probes if len(probes) else sketch.probes(adapted.shapes)
    side, norm, length = SIDES[stage], privacy.init_norm, padded_length(adapted, train)
    if number == 0:
        _hold_company(adapted, task, features[0], probes, side, length)
    account.charge(key, entry)
    sample = poisson_sample(len(features), entry.sampling_rate, streams.sampling)
    room = Room.of(len(features), entry.sampling_rate, micro_batch) if privacy.constant_time else None
    pieces = room.split(sample) if room else [sample[i : i + micro_batch] for i in range(0, len(sample), micro_batch)]
    fill = made_up(adapted, features[0], min(SHORT, length))
    asked = [filled([features[i] for i in piece], fill, room.rows if room else 0) for piece in pieces]
    batches = [(collate(each, adapted, task, length), each.counted) for each in asked]
    total = clipped_sketch(
        adapted.model, batches, partial(_counted_losses, task), probes=probes, side=side, max_norm=norm, normalise=privacy.init_normalise
    )  # fmt: skip
    expected = entry.sampling_rate * len(features)
    upload = add_noise(total, noise_multiplier=entry.noise_multiplier, max_norm=norm, expected=expected, generator=streams.sampling)
    account.note(key, {"clip_rate": total.num_clipped / max(1, total.num_examples)})
    metrics = account.metrics(entry)
    account.keep(key, upload, metrics)
    return Upload(upload, metrics)


def _counted_losses(task: Task, model: nn.Module, batch: tuple[Batch, int]) -> Tensor:
    """Return the losses of a batch, those of its fillers zero."""
    padded, counted = batch
    losses = task.losses(task.forward(model, padded), padded)
    return torch.cat([losses[:counted], 0.0 * losses[counted:]])


def _hold_company(adapted: AdaptedModel, task: Task, like: dict[str, Any], probes: State, side: Side, length: int) -> None:
    """Hold that each of two made-up examples adds to a sketch what it adds alone.

    Raises:
        SelfCheckFailed: ``company``.
    """
    company = Company(adapted, task, adapted.trainable(), lambda batch: task.forward(adapted.model, batch), like=like, length=length)
    company.hold_outputs()
    alone, together = (
        clipped_sketch(adapted.model, batches, partial(_counted_losses, task), probes=probes, side=side, max_norm=UNBOUNDED).sum
        for batches in company.batches()
    )
    if not squared_norm(subtract(together, alone)) <= TOLERANCE**2 * squared_norm(alone):
        raise SelfCheckFailed("company")
