"""A run of any task is evaluated when it is due, averages what clients measure, and learns."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.report.series import final_metrics
from strategies.rounds import RoundState
from tests.strategies.federations import classification, federate
from tests.strategies.rounds import METHODS, ROUNDS, Options


def test_clients_own_metrics_are_averaged_over_those_that_have_them() -> None:
    state = RoundState(1)
    for client, metrics, count in (("a", {"loss": 1.0, "own": 7.0}, 1), ("b", {"loss": 4.0}, 2), ("c", {}, 0)):
        state.measured(client, metrics, count)
    assert state.client_mean() == {"loss": 3.0, "own": 7.0}


def test_a_run_is_evaluated_at_its_start_every_so_often_and_at_its_end(options: Options) -> None:
    more = ["federation.num_rounds=5", "federation.evaluate_clients=true", "data.client_test_fraction=0.3", "train.local_steps=1"]
    rare, always = (federate(options("tiny_bert", "fedavg_lora", *more, f"eval.every={every}")) for every in (2, 1))
    assert rare.sha256 == always.sha256
    for record, each in zip(rare.records, always.records, strict=True):
        due = record.round in (0, 2, 4, 5)
        assert len(record.client_metrics) == (0 if record.round in (0, 1, 3) else 5 if record.round == 5 else len(record.clients))
        assert record.metrics == (each.metrics if due else {})
        assert record.client_metrics == (each.client_metrics if due else {})
    assert final_metrics(rare.records) == always.records[5].metrics


def test_regression_goes_through_a_round(tiny_bert: Path, tmp_path: Path) -> None:
    table = tmp_path / "numbers.csv"
    rows = [f"{'goal ' * (i % 5 + 1)}match,{0.5 * (i % 5)}" for i in range(60)]
    table.write_text("\n".join(["text,score", *rows]) + "\n", encoding="utf-8")
    overrides = [*METHODS["fedex_lora"], *classification(tiny_bert, table), *ROUNDS, "data.task=regression", "data.label=score"]
    federation = federate(overrides)
    assert set(federation.records[-1].metrics) == {"loss", "mse", "pearson", "spearman"}
    assert federation.records[-1].metrics["mse"] == pytest.approx(federation.records[-1].metrics["loss"], rel=1e-5)
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])


def test_pairs_of_sentences_go_through_a_round(tiny_bert: Path, tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    rows = [f"the old {a},a new {b},{'same' if a == b else 'other'}" for a in ("goal", "bank") for b in ("goal", "bank")] * 15
    table.write_text("\n".join(["premise,hypothesis,label", *rows]) + "\n", encoding="utf-8")
    overrides = [*METHODS["fed_sb"], *classification(tiny_bert, table), *ROUNDS, "data.text=[premise,hypothesis]"]
    federation = federate(overrides)
    assert "accuracy" in federation.records[-1].metrics
    assert all(record.exactness_gap < 1e-5 for record in federation.records[1:])


def test_a_run_learns(options: Options) -> None:
    """The words of a text give its label away, of which there are three equally frequent ones."""
    clients = ["federation.num_clients=2", "federation.partition.sizes=[2,1]", "federation.fraction=1.0"]
    more = [*clients, "federation.num_rounds=3", "train.local_steps=12", "train.lr=0.1", "init.kind=gradient"]
    federation = federate(options("tiny_bert", "fed_sb", *more))
    assert federation.records[0].metrics["accuracy"] < 0.5
    assert federation.records[-1].metrics["accuracy"] >= 0.6
    assert federation.records[-1].train_loss < 0.9 * federation.records[1].train_loss
