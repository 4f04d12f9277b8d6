"""A client under ``privacy.unit=example``: charge the ledger, compute, keep the reply; a repeated request releases nothing new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from clients.clipping import Clipping
from clients.private import Mechanism, PrivateFit, private_fit
from clients.private_evidence import add_noise, clipped_sketch, poisson_sample
from fedsb.adapters.starts import SIDES, Sketch
from fedsb.arrays import quantise
from fedsb.errors import UserError
from fedsb.exactness import encoding_error
from fedsb.frozen import Frozen
from fedsb.models import AdaptedModel
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.models import hold_unmixed
from fedsb.privacy.randomness import Streams
from fedsb.schema import PrivacyConfig, TrainConfig
from fedsb.state import State
from fedsb.tasks import Batch, Task
from fedsb.training import Features, Site, collate

TRAIN = "train"


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
    functorch = privacy.grad_sample_mode == "functorch"
    return Mechanism(clipping, entry.sampling_rate, entry.steps, max_batch=privacy.max_batch, functorch=functorch)


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
        close: makes the answer of what was trained and of how it went, and keeps it.
    """

    mechanism: Mechanism
    held: Frozen
    charged: Entry | None
    close: Callable[[State, PrivateFit], Answer]


def open_round(
    adapted: AdaptedModel,
    *,
    frozen: Callable[[], Frozen],
    privacy: PrivacyConfig,
    site: Site,
    account: Account,
    wire_dtype: str = "float32",
) -> Answer | Opened:
    """Charge a round of training; return what was uploaded where the same request came before.

    Args:
        adapted: the model.
        frozen: gives the frozen part, or raises where the client lacks some: before anything is charged.
        privacy: clipping and limits.
        site: client, round and seed.
        account: plan and ledger.
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
    mechanism, check = mechanism_in(account, privacy, site.round), not _went_well(account)
    account.charge(key, entry)

    def close(upload: State, fit: PrivateFit) -> Answer:
        metrics = account.metrics(entry)
        if wire_dtype != "float32":
            metrics["encoding-error"] = encoding_error(upload, quantise(upload, wire_dtype), adapted.spec, adapted.scale, held.basis)
        account.note(key, fit.diagnostics)
        account.ledger.keep(key, upload, metrics)
        return Answer(upload, metrics)

    return Opened(mechanism, held, account.charged(key) if check else None, close)


def private_round(
    adapted: AdaptedModel,
    task: Task,
    features: Features,
    *,
    state: State,
    frozen: Callable[[], Frozen],
    train: TrainConfig,
    privacy: PrivacyConfig,
    site: Site,
    account: Account,
    streams: Streams,
    wire_dtype: str = "float32",
) -> Answer:
    """Train one round with example-level privacy and return what is uploaded, or what was uploaded to the same request before.

    Args:
        adapted: the model.
        task: gives the loss of each example.
        features: all of the client's tokenised examples.
        state: as the server sent it.
        train: optimiser, schedule, lengths.
        frozen: gives the frozen part, or raises where the client lacks some: before anything is charged.
        privacy: clipping and limits.
        site: client, round and seed.
        account: plan and ledger.
        streams: noise and samples.
        wire_dtype: what the upload will be rounded to.

    Raises:
        BudgetExceeded: nothing was charged or computed.
        SelfCheckFailed: training is not what was charged.
        UserError: see :func:`open_round`.
    """
    opened = open_round(adapted, frozen=frozen, privacy=privacy, site=site, account=account, wire_dtype=wire_dtype)
    if isinstance(opened, Answer):
        return opened
    adapted.install(state, opened.held)
    fit = private_fit(
        adapted, task, features, train=train, site=site, mechanism=opened.mechanism, streams=streams, charged=opened.charged
    )  # fmt: skip
    return opened.close(adapted.trained(), fit)


def _went_well(account: Account) -> bool:
    """Tell whether this run's last training was finished: one that failed may have failed its checks."""
    trained = [key for key, _ in account.ledger.charges() if key.run == account.run and key.exchange == TRAIN]
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
        privacy: clipping norm of a sketch.
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
    account.charge(key, entry)
    drawn = [features[i] for i in poisson_sample(len(features), entry.sampling_rate, streams.sampling)]
    drawn.sort(key=lambda f: len(f["input_ids"]))
    batches = [collate(drawn[i : i + micro_batch], adapted, task) for i in range(0, len(drawn), micro_batch)]

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return task.losses(task.forward(model, batch), batch)

    probes = probes if len(probes) else sketch.probes(adapted.shapes)
    norm = privacy.init_norm
    total = clipped_sketch(
        adapted.model, batches, losses, probes=probes, side=SIDES[stage], max_norm=norm, normalise=privacy.init_normalise
    )  # fmt: skip
    expected = entry.sampling_rate * len(features)
    upload = add_noise(total, noise_multiplier=entry.noise_multiplier, max_norm=norm, expected=expected, generator=streams.sampling)
    account.note(key, {"clip_rate": total.num_clipped / max(1, total.num_examples)})
    answer = Answer(upload, account.metrics(entry))
    account.ledger.keep(key, answer.state, answer.metrics)
    return answer
