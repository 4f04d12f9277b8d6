"""A release holds noised values and its account, and what it may not hold is noted beside the ledger."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedsb.config.schema import PrivacyConfig
from fedsb.core.state import Name, sha256, squared_norm, subtract
from fedsb.privacy.account import ALLOWED, DIAGNOSTICS, read_diagnostics
from fedsb.privacy.accounting import epsilon_of
from fedsb.privacy.charges import Key
from tests.clients.private_cases import Case
from tests.clients.releases.charged import ENTRY, START, account, give, keys, train


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
