"""What the laws of private releases share: rounds and exchanges of one client, and the account that they are charged to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clients.private_round import PrivateRound
from clients.private_start import private_evidence
from clients.round import Upload
from fedsb.adapters.starts import Sketch
from fedsb.config.schema import PrivacyConfig
from fedsb.core.state import State
from fedsb.privacy.account import Account
from fedsb.privacy.accounting import Entry
from fedsb.privacy.charges import Key
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.plan import Plan
from fedsb.privacy.randomness import simulated_streams
from fedsb.wire.frozen import FrozenMissing, FrozenView
from fedsb.wire.rounded_uploads import Rounding
from tests.clients.private_cases import SITE, TRAIN, Case

ENTRY = Entry("gaussian", 0.4, 1.1, 3)
START = Entry("gaussian", 0.3, 2.5, 1)


def account(folder: Path, *, max_epsilon: float | None = None, run: str = "run-1", **plan: Any) -> Account:
    given = {"rounds": (1, 2), "start": START, "exchanges": 3, **plan}
    return Account(Ledger(folder, {"client": "client-1"}), Plan(10, 1e-3, ENTRY, **given), "rdp", max_epsilon, run)


def train(
    case: Case,
    held: Account,
    privacy: PrivacyConfig,
    number: int = 1,
    *,
    state: State | None = None,
    wire_dtype: str = "float32",
    frozen: Callable[[], FrozenView] | None = None,
) -> Upload:
    return PrivateRound(
        adapted=case.adapted,
        task=case.task,
        features=case.features,
        train=TRAIN,
        site=replace(SITE, round=number, num_rounds=2),
        frozen=frozen or (lambda: case.frozen),
        rounding=Rounding(wire_dtype),
        privacy=privacy,
        account=held,
        streams=simulated_streams(0, "client-1", number, "train", torch.device("cpu")),
    ).alone(case.state if state is None else state)


def keys(held: Account) -> list[Key]:
    return [key for key, _ in held.ledger.charges()]


def fail(*_: Any) -> FrozenView:
    raise FrozenMissing("head")


def give(case: Case, held: Account, privacy: PrivacyConfig, number: int, features: list[dict[str, Any]] | None = None) -> Upload:
    streams = simulated_streams(0, "client-1", 0, f"range.{number}", torch.device("cpu"))
    case.adapted.reset()
    sketch = Sketch(rank=2, oversample=2, power_iterations=0, seed=0)
    return private_evidence(
        case.adapted,
        case.task,
        case.features if features is None else features,
        sketch=sketch,
        stage="range",
        number=number,
        probes=State(),
        train=TRAIN,
        privacy=privacy,
        micro_batch=4,
        account=held,
        streams=streams,
    )
