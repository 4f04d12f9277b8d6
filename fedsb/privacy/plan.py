"""What will be released in a run, known before round 1: the schedule follows from the seed, and noise is calibrated to its ceiling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedsb.config.schema import PrivacyConfig, TrainConfig
from fedsb.core.errors import UserError
from fedsb.privacy.accounting import calibrate, epsilon_of
from fedsb.privacy.adaptive import sum_multiplier
from fedsb.privacy.entries import MOST_STEPS, Entry
from fedsb.privacy.sampling import drawn_rate

GAUSSIAN = "gaussian"


@dataclass(frozen=True)
class Plan:
    """The releases of one client.

    Attributes:
        num_examples: n, public under the adjacency used (one example zeroed out).
        delta: δ, below 1/n.
        training: entry of one round.
        rounds: server rounds in which the client is drawn.
        start: entry of one exchange of a private start, or None.
        exchanges: number of exchanges of the start.
        evaluation: entry of the metrics of one round on what the client holds out, or None.
        evaluated: server rounds after which the client is asked for them.
    """

    num_examples: int
    delta: float
    training: Entry
    rounds: tuple[int, ...]
    start: Entry | None = None
    exchanges: int = 0
    evaluation: Entry | None = None
    evaluated: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many there are that one of is protected."""
        return self.num_examples

    @property
    def start_entries(self) -> tuple[Entry, ...]:
        """Entries of the whole start."""
        return (self.start,) * self.exchanges if self.start else ()

    @property
    def evaluations(self) -> tuple[Entry, ...]:
        """Entries of all evaluations."""
        return (self.evaluation,) * len(self.evaluated) if self.evaluation else ()

    @property
    def ceiling(self) -> tuple[Entry, ...]:
        """Entries of the whole run: what is held out counts as if it were trained on too."""
        return (*self.start_entries, *(self.training for _ in self.rounds), *self.evaluations)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """The noise multiplier of each kind of release that there is."""
        entries = (self.training if self.rounds else None, self.start, self.evaluation)
        return tuple(entry.noise_multiplier for entry in entries if entry is not None)


def choose_delta(given: float | None, count: int, whose: str) -> float:
    """Return δ, by default min(1e-5, 0.1 / count).

    Raises:
        UserError: δ is not below 1 / count: publishing one of them outright would satisfy it.
    """
    delta = min(1e-5, 0.1 / count) if given is None else given
    if delta >= 1 / count:
        raise UserError(
            f"privacy.delta={delta:g} is not below 1/{count} for {whose}; it must be, or leaving it null takes min(1e-5, 0.1/{count})"
        )
    return delta


def sampling(train: TrainConfig, num_examples: int, client: str) -> tuple[float, int]:
    """Return q, as it is drawn, and the steps of a round: as many as a pass without privacy has.

    Raises:
        UserError: the client has fewer examples than a batch.
    """
    if train.batch_size > num_examples:
        raise UserError(
            f"'{client}' has {num_examples} examples, fewer than train.batch_size={train.batch_size} (a sampling rate above 1); "
            "lower train.batch_size, or deal the data out more evenly (federation.partition.kind=iid)"
        )
    steps = train.local_steps or train.local_epochs * math.ceil(num_examples / train.batch_size)
    return drawn_rate(train.batch_size / num_examples), steps


def make_plan(
    privacy: PrivacyConfig,
    train: TrainConfig,
    *,
    client: str,
    num_examples: int,
    rounds: Sequence[int],
    exchanges: int = 0,
    evidence_examples: int = 0,
    evaluated: Sequence[int] = (),
) -> Plan:
    """Plan a client's releases, with the least noise that keeps them within ``privacy.epsilon``.

    The start and the evaluations have their shares of epsilon, by ``privacy.init_fraction`` and ``privacy.eval_fraction``; training has
    what is left, found with both before it, so that epsilon is that of all releases together.

    Args:
        privacy: target or noise, δ, accountant, share of the start.
        train: batch size and steps.
        client: for messages.
        num_examples: n.
        rounds: server rounds in which the client is drawn.
        exchanges: of a private start; 0 where the start is free.
        evidence_examples: expected size of each exchange's Poisson sample.
        evaluated: server rounds after which the client releases metrics.

    Raises:
        UserError: δ is too large, the client is too small, the steps are too many, or no noise below 1e4 reaches the target.
    """
    delta = choose_delta(privacy.delta, num_examples, f"'{client}'")
    rate, steps = sampling(train, num_examples, client)
    if steps * max(1, len(rounds)) > MOST_STEPS:
        raise UserError(
            f"'{client}' would take {steps * len(rounds):.3g} noised steps, and no more than {MOST_STEPS:.0e} can be accounted for; "
            "lower train.local_steps"
        )
    start = None
    if exchanges:
        start_rate = drawn_rate(min(1.0, evidence_examples / num_examples))
        start = Entry(GAUSSIAN, start_rate, _noise_of(privacy, privacy.init_fraction, delta, start_rate, exchanges), 1)
    evaluation = None
    if evaluated:
        evaluation = Entry(GAUSSIAN, 1.0, _noise_of(privacy, privacy.eval_fraction, delta, 1.0, len(evaluated)), 1)
    before = (*((start,) * exchanges if start else ()), *((evaluation,) * len(evaluated) if evaluation else ()))
    noise = privacy.noise_multiplier or 0.0
    if privacy.epsilon is not None and rounds:
        noise = calibrate(privacy.epsilon, delta, ((rate, steps * len(rounds)),), before=before, accountant=privacy.accountant)
    _check_count(privacy, noise)
    return Plan(num_examples, delta, Entry(GAUSSIAN, rate, noise, steps), tuple(rounds), start, exchanges, evaluation, tuple(evaluated))


def _noise_of(privacy: PrivacyConfig, share: float, delta: float, rate: float, releases: int) -> float:
    """Return the noise multiplier of releases that get a share of epsilon, or the one that is given."""
    if privacy.epsilon is None:
        return privacy.noise_multiplier or 0.0
    return calibrate(share * privacy.epsilon, delta, ((rate, releases),), accountant=privacy.accountant)


@dataclass(frozen=True)
class ServerPlan:
    """The server's own releases under client-level privacy.

    A round's release covers the clients drawn for it, the start's exchanges cover all. The cohorts follow from the seed, which whoever
    knows the configuration knows, so their being a sample amplifies nothing.

    Attributes:
        delta: δ, below 1 / number of clients.
        training: entry of a round.
        rounds: by client, the rounds in which it is drawn.
        start: entry of an exchange of a private start, or None.
        exchanges: number of exchanges of the start.
    """

    delta: float
    training: Entry
    rounds: Mapping[str, tuple[int, ...]]
    start: Entry | None = None
    exchanges: int = 0

    @property
    def count(self) -> int:
        """How many there are that one of is protected."""
        return len(self.rounds)

    def account(self, entries: Sequence[Entry], accountant: str) -> dict[str, float]:
        """Return the account of a client whom ``entries`` of the ledger cover."""
        return {
            "epsilon": epsilon_of(entries, self.delta, accountant),
            "delta": self.delta,
            "noise-multiplier": self.training.noise_multiplier,
        }


def make_server_plan(privacy: PrivacyConfig, rounds: Mapping[str, tuple[int, ...]], *, exchanges: int = 0) -> ServerPlan:
    """Plan the server's releases: the least noise that keeps the client drawn most often within ``privacy.epsilon``.

    Raises:
        UserError: δ is too large, or no noise below 1e4 reaches the target.
    """
    delta = choose_delta(privacy.delta, len(rounds), f"{len(rounds)} clients")
    start = Entry(GAUSSIAN, 1.0, _noise_of(privacy, privacy.init_fraction, delta, 1.0, exchanges), 1) if exchanges else None
    noise, most = privacy.noise_multiplier or 0.0, max(map(len, rounds.values()))
    if privacy.epsilon is not None:
        before = (start,) * exchanges if start else ()
        noise = calibrate(privacy.epsilon, delta, ((1.0, most),), before=before, accountant=privacy.accountant)
    _check_count(privacy, noise)
    return ServerPlan(delta, Entry(GAUSSIAN, 1.0, noise, 1), rounds, start, exchanges)


def _check_count(privacy: PrivacyConfig, noise_multiplier: float) -> None:
    if privacy.clipping == "adaptive":
        sum_multiplier(noise_multiplier, privacy.count_noise)


def unnoised_start(privacy: PrivacyConfig, kind: str | None, evidence: str) -> str | None:
    """Return why no epsilon can be claimed: the start showed gradients of private data without noise. None where it did not."""
    if privacy.unit == "none" or kind != "gradient" or evidence != "clients" or privacy.init_fraction:
        return None
    return (
        "init.kind=gradient with init.evidence=clients and privacy.init_fraction=0: the start uses private data without noise; "
        "use init.kind=weight_svd, init.evidence=public, or privacy.init_fraction=0.1"
    )
