"""What a private client releases, rounds and exchanges: charged first, answered once, refused where plan or budget does not cover it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import clients.private_round
from clients.private import PrivateFit
from clients.private_round import PrivateRound
from clients.private_start import private_evidence
from clients.round import Upload
from fedsb.adapters.starts import Sketch
from fedsb.config.compose import load
from fedsb.config.schema import PrivacyConfig
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State, sha256, squared_norm, subtract
from fedsb.privacy.account import ALLOWED, DIAGNOSTICS, Account, read_diagnostics
from fedsb.privacy.accounting import Entry, epsilon_of
from fedsb.privacy.codes import SelfCheckFailed
from fedsb.privacy.ledger import BudgetExceeded, Key, Ledger
from fedsb.privacy.plan import Plan
from fedsb.privacy.randomness import simulated_streams
from fedsb.wire.frozen import FrozenMissing, FrozenView
from tests.clients.private_cases import SITE, TRAIN, Case, build_case

ENTRY = Entry("gaussian", 0.4, 1.1, 3)
START = Entry("gaussian", 0.3, 2.5, 1)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Case:
    return build_case(tiny_bert, "classification", "lora_sb", "weight_svd")


@pytest.fixture(scope="module")
def privacy() -> PrivacyConfig:
    return load(["privacy=example", "privacy.epsilon=3"]).privacy


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
        wire_dtype=wire_dtype,
        privacy=privacy,
        account=held,
        streams=simulated_streams(0, "client-1", number, "train", torch.device("cpu")),
    ).alone(case.state if state is None else state)


def keys(held: Account) -> list[Key]:
    return [key for key, _ in held.ledger.charges()]


def fail(*_: Any) -> FrozenView:
    raise FrozenMissing("head")


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


def test_metrics_are_the_account_and_nothing_else(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    held = account(tmp_path)
    first = train(case, held, privacy)
    second = train(case, held, privacy, number=2, wire_dtype="bfloat16")
    own = {"epsilon", "delta", "sampling-rate", "noise-multiplier", "steps"}
    assert set(first.metrics) == own
    assert set(second.metrics) == {*own, "encoding-error"} <= ALLOWED
    epsilons = [epsilon_of((ENTRY,) * n, 1e-3, "rdp") for n in (1, 2)]
    assert [first.metrics["epsilon"], second.metrics["epsilon"]] == epsilons
    assert [first.metrics[key] for key in ("sampling-rate", "noise-multiplier", "steps", "delta")] == [ENTRY.sampling_rate, 1.1, 3, 1e-3]
    noted = [json.loads(line) for line in (tmp_path / DIAGNOSTICS).read_text().splitlines()]
    assert [row["round"] for row in noted] == [1, 2]
    assert all(math.isfinite(row[key]) for row in noted for key in ("loss", "clip_rate", "signal_to_noise", "clip_norm"))


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


def test_each_exchange_has_its_own_sample_and_entry(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    """What was drawn shows in the un-noised sums: without noise, equal samples would give equal answers."""
    held = account(tmp_path, start=replace(START, noise_multiplier=0.0))
    answers = [give(case, held, privacy, number) for number in (0, 1, 2)]
    assert held.ledger.charges() == [(Key("run-1", 0, f"evidence-{n}"), (held.plan.start,)) for n in (0, 1, 2)]
    assert len({sha256(answer.sent) for answer in answers}) == 3
    again = give(case, held, privacy, 1)
    assert (sha256(again.sent), again.metrics) == (sha256(answers[1].sent), answers[1].metrics)
    assert len(keys(held)) == 3
    assert all(set(answer.metrics) <= ALLOWED for answer in answers)


def test_an_exchange_is_noised_and_divided_by_the_expected_sample(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    noised, plain = (
        give(case, account(tmp_path / str(sigma), start=replace(START, noise_multiplier=sigma)), privacy, 0).sent for sigma in (2.5, 0.0)
    )
    noise = subtract(noised, plain)
    size = sum(t.numel() for t in noise.values())
    wanted = 2.5 * privacy.init_norm / (START.sampling_rate * 10)
    assert math.sqrt(squared_norm(noise) / size) == pytest.approx(wanted, rel=5 / math.sqrt(2 * size))
    assert all(isinstance(name, Name) and name.role == "Y" for name in noised)


@pytest.mark.parametrize("normalise", [False, True])
def test_an_example_more_moves_an_exchange_by_the_clipping_norm_and_no_further(
    normalise: bool, case: Case, privacy: PrivacyConfig, tmp_path: Path
) -> None:
    """Everybody is drawn and nothing is noised; each gradient is far above C, so that each example adds exactly C or nothing."""
    everyone, bound = replace(START, sampling_rate=1.0, noise_multiplier=0.0), replace(privacy, init_norm=1e-4, init_normalise=normalise)
    sums = []
    for size in (10, 9):
        given = give(case, account(tmp_path / str(size), start=everyone), bound, 0, case.features[:size]).sent
        sums.append(given.map(lambda t, size=size: size * t.double()))  # type: ignore[misc]
    assert math.sqrt(squared_norm(subtract(*sums))) == pytest.approx(1e-4, rel=1e-3)
    assert 1e-4 < math.sqrt(squared_norm(sums[0])) <= 10e-4


def test_an_adaptive_bound_goes_on_where_the_last_round_left_it(case: Case, privacy: PrivacyConfig, tmp_path: Path) -> None:
    adaptive = replace(privacy, clipping="adaptive", max_grad_norm=50.0, count_noise=0.6)
    train(case, account(tmp_path), adaptive, 1)
    first = noted_first(tmp_path)
    train(case, account(tmp_path), adaptive, 2)
    second = json.loads((tmp_path / DIAGNOSTICS).read_text().splitlines()[1])["clip_norm"]
    assert 50.0 > first > second  # every norm lies far below: C falls, and goes on falling
    # A client killed while it noted something leaves half a line.
    with (tmp_path / DIAGNOSTICS).open("a") as file:
        file.write('{"run": "run-1", "rou')
    assert account(tmp_path).last_clip_norm("train", 1) is None
    assert account(tmp_path).last_clip_norm("train", 2) == first
    assert account(tmp_path, run="run-2").last_clip_norm("train", 2) is None


def noted_first(folder: Path) -> float:
    return float(json.loads((folder / DIAGNOSTICS).read_text().splitlines()[0])["clip_norm"])


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


def test_a_note_after_one_that_was_torn_is_read(tmp_path: Path) -> None:
    """A client killed while it notes leaves half a line; the next note must not be glued to it."""
    held = account(tmp_path / "client-1")
    held.note(held.key(1, "train"), {"clip_norm": 1.5, "loss": math.nan})
    path = tmp_path / "client-1" / DIAGNOSTICS
    with path.open("a") as file:
        file.write(path.read_text()[:-9])
    held.note(held.key(2, "train"), {"clip_norm": 2.5})
    assert [[row["clip_norm"] for row in read_diagnostics(tmp_path, number)] for number in (1, 2)] == [[1.5], [2.5]]
    assert held.last_clip_norm("train", 3) == 2.5
