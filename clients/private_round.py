"""A client's round under ``privacy.unit=example``: charged before it computes; a repeated request releases nothing new."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clients.clipping import Clipping
from clients.private import Mechanism, PrivateFit, private_fit, private_lesson
from clients.round import Parameters, Round, Upload
from fedsb.config.schema import PrivacyConfig
from fedsb.core.errors import UserError
from fedsb.core.state import State
from fedsb.models.fit import Lesson
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.charges import Key
from fedsb.privacy.randomness import Streams
from fedsb.tasks.task import Batch

TRAIN = "train"


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


@dataclass(kw_only=True)
class PrivateRound(Round[PrivateFit]):
    """Training by DP-SGD, charged to the client's ledger when it is opened, kept there when it is closed.

    Attributes:
        privacy: clipping and limits.
        account: plan and ledger.
        streams: noise, samples and dropout.
    """

    by_example = True

    privacy: PrivacyConfig
    account: Account
    streams: Streams
    _charged: Entry | None = field(default=None, init=False)  # what the ledger holds for it where the self-checks are to run

    @property
    def dropout(self) -> torch.Generator:
        """Draws the dropout of this client and round."""
        return self.streams.dropout

    @cached_property
    def mechanism(self) -> Mechanism:
        """What the round releases, with the bound that adaptive clipping had reached by then."""
        privacy, reached = self.privacy, None
        if privacy.clipping == "adaptive":
            reached = self.account.last_clip_norm(TRAIN, self.site.round)
        return mechanism_of(privacy if reached is None else replace(privacy, max_grad_norm=reached), self.account.plan.training)

    @property
    def _key(self) -> Key:
        return self.account.key(self.site.round, TRAIN)

    def open(self) -> Upload | None:
        """Charge the round; return what was uploaded where the same request came before, which costs nothing.

        Raises:
            BudgetExceeded: nothing was charged.
            FrozenMissing: likewise.
            UserError: the plan has no such round, or the clipping's settings do not fit the noise; likewise.
        """
        account, number = self.account, self.site.round
        if (kept := account.kept(self._key)) is not None:
            return Upload(*kept)
        if number not in account.plan.rounds:
            raise UserError(f"round {number} is not among those that '{self.site.client}' was drawn for; its noise does not cover it")
        _ = self.held, self.mechanism
        check = not _went_well(account, number, self.adapted.spec.turns)
        account.charge(self._key, account.plan.training)
        self._charged = account.charged(self._key) if check else None
        return None

    def lesson(self, trained: Parameters, forward: Callable[[Batch], Tensor]) -> Lesson[PrivateFit]:
        """Return the lesson; it asks for the gradient of each example of Poisson samples.

        Raises:
            SelfCheckFailed: the model does not depend on what is trained, or mixes examples.
        """
        return private_lesson(self.adapted, trained, forward, self.task, self.features, **self._how())

    def taught(self) -> PrivateFit:
        """Teach the lesson to this client alone.

        Raises:
            SelfCheckFailed: training is not what was charged.
        """
        return private_fit(self.adapted, self.task, self.features, **self._how())

    def _how(self) -> dict[str, Any]:
        return {
            "train": self.train,
            "site": self.site,
            "mechanism": self.mechanism,
            "streams": self.streams,
            "charged": self._charged,
        }

    def metrics(self, result: PrivateFit) -> dict[str, float]:
        """Return the account, and nothing of how it went."""
        return self.account.metrics(self.account.plan.training)

    def close(self, trained: State, result: PrivateFit) -> Upload:
        """Return the upload, and keep it: from then on the same request is answered by it."""
        self.account.note(self._key, result.diagnostics)
        upload = super().close(trained, result)
        self.account.keep(self._key, upload.sent, dict(upload.metrics))
        return upload


def _went_well(account: Account, round_number: int, turns: int) -> bool:
    """Tell whether this run's last training of the same factors was finished: one that failed may have failed its checks."""
    mine = account.key(0, TRAIN)
    alike = [key for key, _ in account.ledger.charges() if key._replace(round=0) == mine]
    trained = [key for key in alike if (key.round - round_number) % turns == 0]
    return bool(trained) and account.ledger.answered(trained[-1])
