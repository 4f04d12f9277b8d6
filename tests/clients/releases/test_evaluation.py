"""Laws of metrics under privacy.unit=example: bounded for every output, noised as charged, charged before, and once for a request."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clients.private_evaluation import bounded, private_metrics
from fedsb.config.schema import PrivacyConfig
from fedsb.core.errors import UserError
from fedsb.models.evaluate import measured
from fedsb.privacy.account import ALLOWED, EVALUATED, Account
from fedsb.privacy.codes import BudgetExceeded
from fedsb.privacy.entries import Entry
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenMissing
from tests.clients.private_cases import TRAIN, Case
from tests.clients.releases.charged import account, fail, keys

SIGMA = 1.5
EVALUATION = Entry("gaussian", 1.0, SIGMA, 1)
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)


def evaluate(case: Case, held: Account, privacy: PrivacyConfig, number: int = 1, **more: Any) -> dict[str, float]:
    how: dict[str, Any] = {"frozen": lambda: case.frozen, "generator": torch.Generator().manual_seed(number), **more}
    return private_metrics(
        case.adapted,
        case.task,
        case.features,
        state=lambda: case.state,
        round_number=number,
        train=TRAIN,
        privacy=privacy,
        account=held,
        **how,
    )


def charging(folder: Path, rounds: int = 2, **more: Any) -> Account:
    return account(folder, evaluation=EVALUATION, evaluated=tuple(range(1, rounds + 1)), **more)


@pytest.mark.parametrize("task", ["classification", "regression", "causal_lm"])
@given(records=arrays.arrays("float32", (3, 2), elements=ANY), targets=st.lists(ANY, min_size=3, max_size=3))
def test_what_is_released_of_an_example_lies_in_the_unit_cube_whatever_a_model_puts_out(task: str, records: Any, targets: Any) -> None:
    """So two examples are at most the square root of the number of values apart, which is what the noise is scaled to."""
    of_task = {"classification": torch.tensor([0, 1, -100]), "regression": torch.tensor(targets), "causal_lm": None}[task]
    rows = torch.from_numpy(records)[:, : 1 if task == "regression" else 2]
    found = bounded(TASKS[task], rows, of_task, 10.0)
    assert set(found) == {"clipped_loss", *(["accuracy"] if task == "classification" else [])}
    for values in found.values():
        assert values.shape == (3,)
        assert bool(((values >= 0) & (values <= 1)).all())


def test_metrics_are_those_of_the_model_with_the_noise_that_is_charged(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    rounds, most = 50, 2.0
    held, how = charging(tmp_path, rounds), replace(privacy, eval_max_loss=most)
    case.adapted.install(case.state, case.frozen)
    items = case.task.items(*measured(case.adapted, case.task, case.features, train=TRAIN))
    truth = {"accuracy": items["accuracy"].double().mean(), "clipped_loss": items["loss"].double().clamp(0, most).mean()}
    found = [evaluate(case, held, how, number) for number in range(1, rounds + 1)]
    spread = SIGMA * math.sqrt(2) / len(case.features)
    assert {each["noise"] for each in found} == {spread}
    for name, scale in (("accuracy", 1.0), ("clipped_loss", most)):
        values = torch.tensor([each[name] for each in found], dtype=torch.float64)
        assert abs(float(values.mean() - truth[name])) < 4 * scale * spread / math.sqrt(rounds)
        assert float(values.std()) == pytest.approx(scale * spread, rel=4 / math.sqrt(2 * rounds))
    assert set(found[0]) == EVALUATED | (ALLOWED - {"num-examples", "layout", "encoding-error"})
    assert [entries for _, entries in held.ledger.charges()] == [(EVALUATION,)] * rounds


def test_a_repeated_request_gets_the_same_metrics_and_costs_nothing(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    held = charging(tmp_path)
    first = evaluate(case, held, privacy)
    assert evaluate(case, held, privacy, generator=torch.Generator().manual_seed(9)) == first
    assert [(key.round, key.exchange) for key in keys(held)] == [(1, "evaluate")]


def test_what_cannot_be_evaluated_is_not_charged(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    for held, number, error in (
        (charging(tmp_path / "a"), 3, UserError),  # no evaluation is planned after round 3
        (account(tmp_path / "b"), 1, UserError),
        (charging(tmp_path / "c", max_epsilon=0.1), 1, BudgetExceeded),
        (charging(tmp_path / "d"), 1, FrozenMissing),
    ):
        with pytest.raises(error):
            evaluate(case, held, privacy, number, **({"frozen": fail} if error is FrozenMissing else {}))
        assert keys(held) == []
    few = charging(tmp_path / "e")
    large = replace(few, plan=replace(few.plan, delta=1 / len(case.features)))
    with pytest.raises(UserError, match="is not below 1/"):
        evaluate(case, large, privacy)
    assert keys(large) == []
