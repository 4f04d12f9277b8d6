"""What clients measure: their own models and what is shared of them, and nothing where nothing is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.app.assembly import task_of
from fedsb.app.client_data import client_features
from fedsb.models.evaluate import evaluate
from fedsb.report.clients import client_spread, spread_text
from fedsb.run.records import SHARED
from tests.strategies.federations import classification, federate

SCHEDULE = ["federation.num_rounds=2", "train.lr=0.02", "init.kind=null", "federation.evaluate_clients=true"]


@pytest.fixture
def data(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return [*classification(tiny_bert, tiny_csv), *SCHEDULE, "data.client_test_fraction=0.3"]


@pytest.mark.parametrize("method", ["fedsa_lora", "local_only"])
def test_what_is_shared_of_personal_models_is_measured_beside_them_once(method: str, data: list[str]) -> None:
    """B begins at zero and the head stays at home: what is left is the untouched base."""
    federation = federate([*data, f"method={method}", "federation.fraction=0.6", "federation.min_replies=1"])
    first, last = federation.records[1:]
    assert not any(name.startswith(SHARED) for row in first.client_metrics.values() for name in row)
    base = federation.fresh_model()
    for client, row in last.client_metrics.items():
        own = {name: value for name, value in row.items() if not name.startswith(SHARED)}
        shared = {name.removeprefix(SHARED): value for name, value in row.items() if name.startswith(SHARED)}
        held_out = client_features(federation.config, client, None, federation.prepared.labels)[1]
        assert shared == pytest.approx(evaluate(base, task_of(federation.config), held_out, train=federation.config.train))
        assert (shared["loss"] == own["loss"]) == (federation.prepared.strategy.counted.get(client, 0) == 0)
    assert not any(name.startswith(SHARED) for name in last.metrics)
    assert "*shared* is what one that has never trained would use" in spread_text(federation.records)


@pytest.mark.parametrize("method", ["fedavg_lora", "fedsa_lora"])
def test_who_holds_nothing_out_is_no_failure_and_counts_in_no_mean(method: str, data: list[str]) -> None:
    few = "federation.partition.sizes=[40,40,40,40,1]"
    federation = federate([*data, f"method={method}", few])
    silent = {
        client
        for client in federation.prepared.strategy.participation.clients
        if not client_features(federation.config, client, None, federation.prepared.labels)[1]
    }
    last = federation.records[-1]
    assert len(silent) == 1
    assert not any(record.failed for record in federation.records)
    assert {client for client, row in last.client_metrics.items() if not row} == silent
    assert len(last.client_metrics) == 5
    assert client_spread(federation.records)["accuracy"]["clients"] == 4
    assert "Nothing is held out at 1 of 5 clients" in spread_text(federation.records)
    if method == "fedsa_lora":
        assert last.metrics["accuracy"] == pytest.approx(_weighted(federation, last.client_metrics))


def _weighted(federation, rows) -> float:  # type: ignore[no-untyped-def]
    labels = federation.prepared.labels
    held = {client: len(client_features(federation.config, client, None, labels)[1]) for client in rows}
    return sum(held[client] * row["accuracy"] for client, row in rows.items() if row) / sum(held.values())
