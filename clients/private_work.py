"""A client under ``privacy.unit=example``: charge the ledger, compute, keep the reply; a repeated request releases nothing new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clients.clipping import Clipping
from clients.company import SHORT, TOLERANCE, Company, made_up
from clients.physical import Room, filled
from clients.private import Mechanism, PrivateFit, private_fit
from clients.private_evidence import add_noise, clipped_sketch, poisson_sample
from clients.sampling import padded_length
from fedsb.adapters.starts import SIDES, Side, Sketch
from fedsb.config.schema import PrivacyConfig, TrainConfig
from fedsb.core.errors import UserError
from fedsb.core.state import State, squared_norm, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import Features, Site, collate
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.models import hold_unmixed
from fedsb.privacy.randomness import Streams
from fedsb.tasks.task import Batch, Task
from fedsb.wire.frozen import FrozenView

TRAIN = "train"
UNBOUNDED = 1e30  # a norm that nothing is clipped to


@dataclass(frozen=True)
class Answer:
    """A private reply: noised arrays, and metrics out of :data:`fedsb.privacy.account.ALLOWED`."""

    state: State
    metrics: dict[str, float]


def mechanism_of(privacy: PrivacyConfig, entry: Entry) -> Mechanism:
    """Return the mechanism of a round."""
    clipping = Clipping(
        kind=privacy.clipping,
        max_norm=privacy.max_grad_norm,
        noise_multiplier=entry.noise_multiplier,
        quantile=privacy.quantile,
        quantile_lr=privacy.quantile_lr,
        count_noise=privacy.count_noise,
    )
    return Mechanism(
        clipping,
        entry.sampling_rate,
        entry.steps,
        max_batch=privacy.max_batch,
        functorch=privacy.grad_sample_mode == "functorch",
        constant_time=privacy.constant_time,
    )


def mechanism_in(account: Account, privacy: PrivacyConfig, round_number: int) -> Mechanism:
    """Return the mechanism of a client's training in a round, with the bound that adaptive clipping had reached by then."""
    if privacy.clipping == "adaptive" and (reached := account.last_clip_norm(TRAIN, round_number)) is not None:
        privacy = replace(privacy, max_grad_norm=reached)
    return mechanism_of(privacy, account.plan.training)


@dataclass(frozen=True)
class Opened:
    """A private round that is charged and not computed yet.

    Attributes:
        held: the frozen part that it is based on.
        charged: what the ledger holds for it where the self-checks are to run.
        close: makes the answer of what was trained and of how it went, and keeps both.
    """

    mechanism: Mechanism
    held: FrozenView
    charged: Entry | None
    close: Callable[[State, PrivateFit], Answer]


def open_round(
    adapted: AdaptedModel,
    *,
    frozen: Callable[[], FrozenView],
    privacy: PrivacyConfig,
    site: Site,
    account: Account,
    keep_own: Callable[[State], None] = lambda trained: None,
    wire_dtype: str = "float32",
) -> Answer | Opened:
    """Charge a round of training; return what was uploaded where the same request came before.

    Args:
        adapted: the model.
        frozen: gives the frozen part, or raises where the client lacks some: before anything is charged.
        privacy: clipping and limits.
        site: client, round and seed.
        account: plan and ledger.
        keep_own: keeps what of a client's trained factors is its own.
        wire_dtype: what the upload will be rounded to.

    Raises:
        BudgetExceeded: nothing was charged.
        UserError: the plan has no such round, or the clipping's settings do not fit the noise.
    """
    key = account.key(site.round, TRAIN)
    if (kept := account.ledger.kept(key)) is not None:
        return Answer(*kept)
    if site.round not in account.plan.rounds:
        raise UserError(f"round {site.round} is not among those that '{site.client}' was drawn for; its noise does not cover it")
    held = frozen()
    entry = account.plan.training
    mechanism, check = mechanism_in(account, privacy, site.round), not _went_well(account, site.round, adapted.spec.turns)
    account.charge(key, entry)

    def close(trained: State, fit: PrivateFit) -> Answer:
        upload, told = adapted.upload(trained, site.round, held.basis, wire_dtype)
        metrics = {**account.metrics(entry), **told}
        account.note(key, fit.diagnostics)
        # First: a reply that is kept is not computed again.
        keep_own(trained)
        account.ledger.keep(key, upload, metrics)
        return Answer(upload, metrics)

    return Opened(mechanism, held, account.charged(key) if check else None, close)


def private_round(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    state: State,
    frozen: Callable[[], FrozenView],
    train: TrainConfig,
    privacy: PrivacyConfig,
    site: Site,
    account: Account,
    streams: Streams,
    keep_own: Callable[[State], None] = lambda trained: None,
    wire_dtype: str = "float32",
) -> Answer:
    """Train one round with example-level privacy and return what is uploaded, or what was uploaded to the same request before.

    Args:
        adapted: the model.
        task: gives the loss of each example.
        features: all of the client's tokenised examples.
        state: what the client starts from.
        train: optimiser, schedule, lengths.
        frozen: gives the frozen part, or raises where the client lacks some: before anything is charged.
        privacy: clipping and limits.
        site: client, round and seed.
        account: plan and ledger.
        streams: noise and samples.
        keep_own: keeps what of the client's trained factors is its own.
        wire_dtype: what the upload will be rounded to.

    Raises:
        BudgetExceeded: nothing was charged or computed.
        SelfCheckFailed: training is not what was charged.
        UserError: see :func:`open_round`.
    """
    opened = open_round(
        adapted, frozen=frozen, privacy=privacy, site=site, account=account, keep_own=keep_own, wire_dtype=wire_dtype
    )  # fmt: skip
    if isinstance(opened, Answer):
        return opened
    adapted.install(state, opened.held, site.round)
    fit = private_fit(
        adapted, task, features, train=train, site=site, mechanism=opened.mechanism, streams=streams, charged=opened.charged
    )  # fmt: skip
    return opened.close(adapted.trained(), fit)


def _went_well(account: Account, round_number: int, turns: int) -> bool:
    """Tell whether this run's last training of the same factors was finished: one that failed may have failed its checks."""
    mine = account.key(0, TRAIN)
    alike = [key for key, _ in account.ledger.charges() if key._replace(round=0) == mine]
    trained = [key for key in alike if (key.round - round_number) % turns == 0]
    return bool(trained) and account.ledger.kept(trained[-1]) is not None


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
) -> Answer:
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
    if (kept := account.ledger.kept(key)) is not None:
        return Answer(*kept)
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
    answer = Answer(upload, account.metrics(entry))
    account.ledger.keep(key, answer.state, answer.metrics)
    return answer


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
