"""A release is charged once, before it is computed, and refused without a charge where plan or budget does not cover it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.private_round
from clients.private import PrivateFit
from fedsb.config.schema import PrivacyConfig
from fedsb.core.errors import UserError
from fedsb.core.state import State, sha256
from fedsb.privacy.accounting import Entry, epsilon_of
from fedsb.privacy.charges import Key
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.ledger import BudgetExceeded
from fedsb.wire.frozen import FrozenMissing
from tests.clients.private_cases import Case
from tests.clients.releases.charged import ENTRY, account, fail, give, keys, train


def test_a_round_is_charged_and_answered_once(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    held = account(tmp_path)
    answer = train(case, held, privacy)
    assert held.ledger.charges() == [(Key("run-1", 1, "train"), (ENTRY,))]
    assert sha256(answer.sent) == sha256(case.adapted.trained()) != sha256(case.state)
    assert set(answer.sent) == set(case.state.pick("R", "head"))
    case.adapted.reset()
    # A process of its own would open the ledger again; nothing is asked for but the key.
    again = train(case, account(tmp_path), privacy, frozen=fail, state=State())
    assert (sha256(again.sent), again.metrics) == (sha256(answer.sent), answer.metrics)
    assert len(keys(held)) == 1
    assert sha256(case.adapted.trained()) == sha256(case.adapted.initial.pick("R", "head"))  # nothing was trained


def test_a_failure_in_training_leaves_the_charge(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    held = account(tmp_path)
    with pytest.raises(IndexError):
        train(replace(case, features=[{**f, "target": 9} for f in case.features]), held, privacy)
    assert keys(held) == [Key("run-1", 1, "train")]
    train(case, held, privacy)
    assert keys(held) == [Key("run-1", 1, "train")] * 2


def test_a_round_is_checked_until_one_was_finished(case: Case, privacy: PrivacyConfig, tmp_path: Path, monkeypatch: Any) -> None:
    """A retry of what failed its checks must not pass for want of them."""
    checked: list[bool] = []
    real = clients.private_round.private_fit

    def noted(*args: Any, charged: Entry | None, **kwargs: Any) -> PrivateFit:
        checked.append(charged is not None)
        return real(*args, charged=charged, **kwargs)

    monkeypatch.setattr(clients.private_round, "private_fit", noted)
    held = account(tmp_path)
    layer = next(iter(case.adapted.layers.values()))
    handle = layer.B.register_forward_hook(lambda module, given, out: 0.0 * out)
    for _ in range(2):
        with pytest.raises(SelfCheckFailed):
            train(case, held, privacy)
    handle.remove()
    train(case, held, privacy)
    train(case, held, privacy, number=2)
    train(case, account(tmp_path, run="run-2"), privacy)
    assert checked == [True, True, True, False, True]


def refused_round(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    train(case, account(folder), privacy, number=3)


def refused_budget(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    train(case, account(folder, max_epsilon=epsilon_of((ENTRY,), 1e-3, "rdp") * 0.999), privacy)


def refused_frozen(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    train(case, account(folder), privacy, frozen=fail)


def refused_count_noise(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    train(case, account(folder), replace(privacy, clipping="adaptive", count_noise=0.5))


def refused_exchange(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    give(case, account(folder), privacy, 3)


def refused_start(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    give(case, account(folder, start=None, exchanges=0), privacy, 0)


def refused_start_budget(case: Case, privacy: PrivacyConfig, folder: Path) -> None:
    give(case, account(folder, max_epsilon=1e-3), privacy, 0)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (refused_round, UserError, "round 3 is not among those"),
        (refused_budget, BudgetExceeded, r"holds epsilon 0.000 at delta .*, and \d.* with train of round 1"),
        (refused_frozen, FrozenMissing, "head"),
        (refused_count_noise, UserError, "count_noise=0.5 must be above half"),
        (refused_exchange, UserError, "no such exchange"),
        (refused_start, UserError, "no such exchange"),
        (refused_start_budget, BudgetExceeded, r"holds epsilon 0.000 at delta .*, and \d.* with evidence-0 of round 0"),
    ],
)
def test_what_is_refused_is_neither_charged_nor_computed(
    case: Case, privacy: PrivacyConfig, tmp_path: Path, request_: Callable[..., None], error: type[Exception], message: str
) -> None:
    case.adapted.reset()
    before = {name: p.detach().clone() for name, p in case.adapted.model.named_parameters()}
    with pytest.raises(error, match=message):
        request_(case, privacy, tmp_path)
    assert keys(account(tmp_path)) == []
    assert all(torch.equal(p, before[name]) for name, p in case.adapted.model.named_parameters())


def test_the_budget_is_that_of_the_whole_ledger(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    most = epsilon_of((ENTRY,) * 2, 1e-3, "rdp")
    train(case, account(tmp_path, run="another"), privacy)
    held = account(tmp_path, max_epsilon=most)
    train(case, held, privacy)
    with pytest.raises(BudgetExceeded):
        train(case, held, privacy, number=2)
    train(case, held, privacy)  # a kept answer costs nothing
    assert len(keys(held)) == 2


@pytest.mark.parametrize(("repeatable", "charged"), [(True, 1), (False, 2)])
def test_a_release_computed_again_is_a_new_one_unless_its_noise_is_the_same(repeatable: bool, charged: int, tmp_path: Path) -> None:
    held = replace(account(tmp_path), repeatable=repeatable)
    for _ in range(2):
        held.charge(held.key(1, "train"), ENTRY)
    held.charge(held.key(2, "train"), ENTRY)
    assert [key.round for key in keys(held)] == [1] * charged + [2]


def test_what_was_paid_for_is_not_replaced_by_something_else(tmp_path: Path) -> None:
    """A simulation repeats a release for nothing; with another rate or noise it would be another one, at the old one's price."""
    held = replace(account(tmp_path), repeatable=True)
    held.charge(held.key(1, "train"), ENTRY)
    for other in (replace(ENTRY, sampling_rate=1.0), replace(ENTRY, noise_multiplier=0.5), replace(ENTRY, steps=4)):
        with pytest.raises(UserError, match=r"ledger.jsonl' holds another release for exchange 'train' of round 1$"):
            held.charge(held.key(1, "train"), other)
    assert held.ledger.entries() == (ENTRY,)
