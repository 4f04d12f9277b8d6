"""Faults on purpose: drawn from the seed, met by the server's own checks, and of no effect on whoever has none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients import faults as faults_module
from clients.faults import Faults, drawn
from fedsb import client_app
from fedsb.config.checks import FAULTS
from fedsb.config.compose import load
from fedsb.config.schema import FaultConfig
from fedsb.core.errors import UserError
from fedsb.privacy.account import LEDGERS
from fedsb.privacy.codes import CODES
from fedsb.run.folder import read_run
from fedsb.run.records import RoundRecord
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from tests.strategies.private_runs import EXAMPLE, small

NONE = FaultConfig(dropout=0, crash=0, crash_step=None, straggle=0, delay=0.01, corrupt=0, nan=0)
REASONS = {
    "dropout": "stayed away (faults.dropout)",
    "crash": "crashed after step 1 (faults.crash)",
    "corrupt": "cannot be read",
    "nan": "holds NaN or infinity",
}
Federate = Callable[..., tuple[dict[str, Any], list[RoundRecord]]]


@pytest.fixture
def federate(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federate:
    """Run a small federation of two rounds; clients in ``away`` (client, round) raise before anything else."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))

    def go(name: str, *more: str, away: frozenset[tuple[str, int]] = frozenset()) -> tuple[dict[str, Any], list[RoundRecord]]:
        def app(message: Message, context: Context) -> Message:
            told = message.content.config_records["config"]
            if message.metadata.message_type == "train" and (told["client"], told["round"]) in away:
                raise RuntimeError("away")
            return client_app.app(message, context)

        overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", *more)
        folder = tmp_path / name
        summary = serve(load(overrides), LocalGrid.simulation(app, {"overrides": join(overrides), "output": str(folder)}), folder)
        return summary, read_run(folder).records

    return go


def with_(kind: str, probability: float) -> FaultConfig:
    return FaultConfig(**{**NONE.__dict__, kind: probability})


def happened(kind: str, found: Faults) -> bool:
    value = getattr(found, {"crash": "crash_step", "straggle": "delay"}.get(kind, kind))
    return value is not None and bool(value)


@pytest.mark.parametrize("kind", FAULTS)
def test_each_kind_has_its_share_and_its_own_draw(kind: str) -> None:
    places = [(f"c{i}", number) for i in range(40) for number in range(50)]
    alone = [drawn(with_(kind, 0.3), seed=1, client=client, round_number=number) for client, number in places]
    every = FaultConfig(**{**NONE.__dict__, **dict.fromkeys(FAULTS, 0.3)})
    beside = [drawn(every, seed=1, client=client, round_number=number) for client, number in places]
    hits = [happened(kind, found) for found in alone]
    assert hits == [happened(kind, found) for found in beside]
    assert abs(sum(hits) - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5
    assert not any(happened(other, found) for other in FAULTS if other != kind for found in alone)
    assert hits != [happened(kind, drawn(with_(kind, 0.3), seed=2, client=c, round_number=n)) for c, n in places]


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("privacy", [(), EXAMPLE], ids=["plain", "private"])
def test_a_run_with_faults_is_a_run_without_those_clients(kind: str, privacy: tuple[str, ...], federate: Federate) -> None:
    config = FaultConfig(**{**with_(kind, 0.4).__dict__, "crash_step": 1})
    hit = {
        (f"client-{i}", number)
        for i in range(4)
        for number in (1, 2)
        if happened(kind, drawn(config, seed=5, client=f"client-{i}", round_number=number))
    }
    assert 0 < len(hit) < 8
    summary, records = federate("faulty", "seed=5", f"faults.{kind}=0.4", "faults.crash_step=1", *privacy)
    expected, _ = federate("away", "seed=5", *privacy, away=frozenset(hit))
    assert {(client, record.round) for record in records for client in record.failed} == hit
    if not privacy:
        assert all(REASONS[kind] in reason for record in records for reason in record.failed.values())
    assert summary["factors_sha256"] == expected["factors_sha256"]


def test_a_crash_in_private_training_has_been_charged(federate: Federate, tmp_path: Path) -> None:
    _, records = federate("run", "faults.crash=0.4", "faults.crash_step=1", "seed=5", *EXAMPLE)
    crashed = [(client, record.round) for record in records for client in record.failed]
    assert crashed
    for client, number in crashed:
        charges = (tmp_path / "run" / LEDGERS / client / "ledger.jsonl").read_text()
        assert f'["simulation", {number}, "train"]' in charges


def test_a_straggler_is_late_and_no_worse(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(faults_module.time, "sleep", waited.append)
    summary, records = federate("late", "faults.straggle=0.5", "faults.delay=100")
    late = [seconds for seconds in waited if seconds]
    assert 0 < len(late) < 8
    assert not any(record.failed for record in records)
    assert summary["factors_sha256"] == federate("prompt")[0]["factors_sha256"]


def test_a_real_node_has_faults_enough(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = join(small(tiny_bert, tmp_path, "faults=some"))
    grid = LocalGrid(client_app.app, {"overrides": overrides}, {1: {"client": "client-0", "data-path": str(tmp_path / "train.csv")}})
    [reply] = grid.send_and_receive([Message(RecordDict({"config": ConfigRecord({"client": "client-0", "round": 1})}), 1, "train")])
    assert dict(reply.content.metric_records["metrics"]) == {"code": CODES["refused"].number}
    assert "faults are for simulations; leave faults=… out" in caplog.text


@pytest.mark.parametrize(("key", "allowed"), [("dropout=1.5", r"in \[0, 1\]"), ("crash_step=0", "at least 1"), ("delay=-1.0", "above 0")])
def test_what_no_fault_can_be_is_refused(key: str, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"^faults\.{key} is out of range; it must be {allowed}"):
        load([f"faults.{key}"])
