"""Laws of whole runs under privacy.unit=example: what epsilon says, what a budget refuses, what a start costs."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

import pytest

from fedsb.app.asked import config_of as client_config
from fedsb.client_app import app as client_app
from fedsb.privacy.codes import CODES
from fedsb.server_app import serve
from tests.strategies.federations import KeepingGrid
from tests.strategies.private_runs import (
    EXAMPLE,
    ledger_lines,
    rdp_epsilon,
    releases,
    run_privately,
    small,
)

PARTIAL = ("privacy=example", "privacy.epsilon=3", "federation.fraction=0.5", "federation.num_rounds=4")
START = ("init.kind=gradient", "init.num_examples=10")


@dataclass(frozen=True)
class Served:
    """A run by ``serve``, report and table included."""

    folder: Path
    summary: dict[str, Any]
    printed: str
    overrides: list[str]


def served(overrides: list[str], folder: Path) -> Served:
    screen = io.StringIO()
    grid = KeepingGrid(client_app, {"overrides": join(overrides), "output": str(folder)}, {1: {"partition-id": 0, "num-partitions": 1}})
    with redirect_stdout(screen):
        serve(client_config(join(overrides)), grid, folder)
    return Served(folder, json.loads((folder / "summary.json").read_text()), screen.getvalue(), overrides)


@pytest.fixture(scope="module")
def partial(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Two of four clients a round, four rounds, noise calibrated to each client's own schedule."""
    folder = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(folder / "home"))
        return served(small(tiny_bert, folder, *PARTIAL), folder / "run")


def test_epsilon_is_what_opacus_says_of_the_ledgers(partial: Served) -> None:
    told = partial.summary["epsilon"]
    charges = {path.name: ledger_lines(partial.folder, path.name) for path in (partial.folder / "ledgers").iterdir() if path.is_dir()}
    assert set(told["clients"]) == set(charges)
    for client, account in told["clients"].items():
        assert account["epsilon"] == pytest.approx(rdp_epsilon(releases(charges[client])), rel=1e-3)
        assert account["epsilon"] <= 3
    most = max(charges, key=lambda client: len(charges[client]))
    assert len({len(lines) for lines in charges.values()}) > 1
    assert told["clients"][most]["epsilon"] >= 0.97 * 3
    assert told["max"] == max(account["epsilon"] for account in told["clients"].values())
    assert told["min"] == min(account["epsilon"] for account in told["clients"].values())


def test_records_table_and_report_say_the_same(partial: Served) -> None:
    records = [json.loads(line) for line in (partial.folder / "metrics.jsonl").read_text().splitlines()]
    told = partial.summary["epsilon"]
    assert records[0]["epsilon"] is None
    assert {key: told[key] for key in records[-1]["epsilon"]} == records[-1]["epsilon"]
    maxima = [record["epsilon"]["max"] for record in records[1:]]
    assert maxima == sorted(maxima)
    most, least = (f"{-(-told[end] * 100 // 1) / 100:.2f}" for end in ("max", "min"))
    shown = most if told["max"] == told["min"] else f"at most {most}, at least {least}"
    line = f"{shown} per example at delta 1.0e-05 (rdp, simulated)"
    assert re.search(rf"\| epsilon +\| {re.escape(line)}", partial.printed)
    assert f"Epsilon is **{line}**" in (partial.folder / "report.md").read_text()
    assert f"epsilon {most}  " in partial.printed  # the last round's own line
    assert "calibrated to the whole schedule" in partial.printed
    assert partial.printed.count("not covered: a person with several examples") == 1


def test_training_figures_are_of_the_simulation_only(partial: Served) -> None:
    records = [json.loads(line) for line in (partial.folder / "metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        assert record["train_loss"] is None
        assert record["accounts"] == record["client_metrics"] == {}
        assert set(record["simulation_only"]) == {"train_loss", "clip_rate", "signal_to_noise", "clip_norm"}


def test_an_equal_seed_gives_equal_bits_and_an_equal_epsilon(partial: Served, tmp_path: Path) -> None:
    again = run_privately(partial.overrides, tmp_path / "again")
    assert again.sha256 == partial.summary["factors_sha256"]
    assert again.claim.final(simulated=True) == partial.summary["epsilon"]


def test_a_budget_refuses_before_training_and_the_others_go_on(tiny_bert: Path, tmp_path: Path) -> None:
    """client-1 holds a third of client-0's examples, and reaches the budget first."""
    shares = ("federation.num_clients=2", "federation.partition.kind=size", "federation.partition.sizes=[3,1]", "federation.num_rounds=3")
    history = [(2.0, 0.5, 2)] * 3
    limit = (rdp_epsilon(history[:2]) + rdp_epsilon(history)) / 2
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, *shares, f"privacy.max_epsilon={limit}")
    run = run_privately(overrides, tmp_path / "run")
    assert run.error is None
    assert [record.failed for record in run.records[1:]] == [{}, {}, {"client-1": CODES["budget"].text}]
    assert run.records[3].clients == ("client-0",)
    assert [tuple(charge["key"][1:]) for charge in ledger_lines(run.folder, "client-1")] == [(1, "train"), (2, "train")]
    assert len(ledger_lines(run.folder, "client-0")) == 3
    assert not [line for line in diagnostics(run.folder, "client-1") if line["round"] == 3]
    epsilon = run.records[3].epsilon
    assert epsilon is not None
    assert epsilon["silent"] == []
    assert epsilon["clients"]["client-1"]["epsilon"] == pytest.approx(rdp_epsilon(history[:2]), rel=1e-3)


def diagnostics(folder: Path, client: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledgers" / client / "diagnostics.jsonl").read_text().splitlines()]


def test_a_start_without_noise_takes_epsilon_away_everywhere(tiny_bert: Path, tmp_path: Path) -> None:
    run = served(small(tiny_bert, tmp_path, *EXAMPLE, *START, "federation.num_rounds=1"), tmp_path / "run")
    reason = "init.kind=gradient with init.evidence=clients and privacy.init_fraction=0: the start uses private data without noise"
    assert run.summary["epsilon"] is None
    assert run.summary["epsilon_reason"].startswith(reason)
    assert all(json.loads(line)["epsilon"] is None for line in (run.folder / "metrics.jsonl").read_text().splitlines())
    flat = " ".join(run.printed.replace("|", " ").split())
    assert f"privacy: no epsilon will be claimed: {reason}" in run.printed
    assert f"epsilon not claimed ({reason}" in flat
    assert f"**Epsilon is not claimed**: {reason}" in (run.folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (["init.kind=weight_svd"], "the start (weight_svd) uses no data"),
        ([*START, "init.evidence=public", "data.public_fraction=0.05"], "the start (gradient) uses the server's public text"),
    ],
)
def test_a_start_without_private_data_costs_nothing(start: list[str], told: str, tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, *start, "federation.num_rounds=1"), tmp_path / "run")
    assert f"privacy: {told} and costs nothing" in run.printed
    assert "noise multiplier 2, as given" in run.printed
    assert {len(ledger_lines(run.folder, f"client-{i}")) for i in range(4)} == {1}
    assert run.claim.final(simulated=True)["max"] > 0


def test_a_private_start_is_charged_by_the_exchange(tiny_bert: Path, tmp_path: Path) -> None:
    overrides = small(tiny_bert, tmp_path, *START, "privacy=example", "privacy.epsilon=3", "privacy.init_fraction=0.3")
    run = run_privately([*overrides, "init.power_iterations=2", "federation.fraction=0.75"], tmp_path / "run")
    assert not any(record.failed for record in run.records)
    for client, account in run.claim.final(simulated=True)["clients"].items():
        charges = ledger_lines(run.folder, client)
        started = [charge["key"] for charge in charges if charge["key"][1] == 0]
        assert started == [["simulation", 0, f"evidence-{i}"] for i in range(6)]  # 2 + 2p
        assert rdp_epsilon(releases(charges[:6])) == pytest.approx(0.9, rel=0.03)
        assert account["epsilon"] == pytest.approx(rdp_epsilon(releases(charges)), rel=1e-3)
        assert 0.97 * 3 <= account["epsilon"] <= 3
    assert "privacy: the start's sketch has a signal-to-noise of at most" in run.printed
