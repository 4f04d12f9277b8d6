"""The row of the audit that evaluates: a client's metrics on what it holds out, by the client's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from exact import Bits, Values
from rows import DELTA, entry_of
from subject import TASK, Subject, zeroed
from watch import Release

from clients import private_evaluation
from fedsb.config.compose import load
from fedsb.config.schema import PrivacyConfig
from fedsb.core.state import State
from fedsb.models.evaluate import measured
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.plan import Plan
from fedsb.privacy.randomness import simulated_streams

ROUNDS, EXAMPLES = 16, 12
LEAST_LOSS = 1e-6  # that every canary's loss is above: cut to it, it counts as much as a loss can
VALUES = ("accuracy", "clipped_loss")


@dataclass
class EvaluationRow:
    """A client's evaluations in some rounds; its canaries are of the classes that the model finds: each counts as much as it can."""

    name: str
    covers: str
    subject: Subject
    entry: Entry
    attacked: bool = False
    checked: bool = True
    neighbours: Sequence[int] | None = None
    examples: int = EXAMPLES
    count_noise: float | None = None
    reaches: bool = True

    @property
    def deviation(self) -> float:
        return self.entry.noise_multiplier

    @property
    def sizes(self) -> Mapping[str, int]:
        return dict.fromkeys(VALUES, 1)

    @property
    def pulls(self) -> Values:
        return np.full((self.examples, len(VALUES)), 1 / math.sqrt(len(VALUES)))

    @cached_property
    def _canaries(self) -> list[dict[str, Any]]:
        first, adapted = self.subject.canaries[: self.examples], self.subject.adapted
        adapted.install(self.subject.start, self.subject.frozen)
        found, _ = measured(adapted, TASK, first, train=self.subject.train)
        losses = torch.nn.functional.cross_entropy(found.float(), guesses := found.argmax(-1), reduction="none")
        assert float(losses.min()) > LEAST_LOSS, "a canary whose loss is not cut counts less than it can: what is seen would be a part"
        return [{**canary, "target": guess} for canary, guess in zip(first, guesses.tolist(), strict=True)]

    @cached_property
    def _privacy(self) -> PrivacyConfig:
        return replace(load(["privacy=example", "privacy.epsilon=4"]).privacy, eval_max_loss=LEAST_LOSS)

    def release(self, present: Bits, run: int) -> Release:
        data, once = zeroed(self._canaries, present), replace(self.entry, steps=1)
        rounds = tuple(range(1, ROUNDS + 1))
        plan = Plan(self.examples, DELTA, once, (), evaluation=once, evaluated=rounds)
        with TemporaryDirectory() as folder:
            account = Account(Ledger(Path(folder), {"client": "audited"}), plan, "rdp", None, "audit")
            return Release(tuple(self._values(data, account, number, run) for number in rounds))

    def _values(self, data: list[dict[str, Any]], account: Account, number: int, run: int) -> Values:
        """Return an evaluation's sums, over the sensitivity that is claimed."""
        found = private_evaluation.private_metrics(
            self.subject.adapted,
            TASK,
            data,
            state=self._start,
            frozen=lambda: self.subject.frozen,
            round_number=number,
            train=self.subject.train,
            privacy=self._privacy,
            account=account,
            generator=simulated_streams(run, self.name, number, private_evaluation.EVALUATE, torch.device("cpu")).sampling,
        )
        sums = np.array([found["accuracy"], found["clipped_loss"] / LEAST_LOSS]) * self.examples
        values: Values = sums / math.sqrt(len(VALUES))
        return values

    def _start(self) -> State:
        return self.subject.start

    def counted(self, present: Bits, drawn: Bits | None) -> Values:
        raise AssertionError


def evaluation_rows(subject: Subject) -> list[EvaluationRow]:
    """Give the rows that evaluate."""
    return [EvaluationRow("evaluation", "metrics on held-out examples (federation.evaluate_clients)", subject, entry_of(1.0, ROUNDS))]
