"""Evaluation on clients under privacy.unit=example, in whole runs: planned within epsilon, charged, told apart from what trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.app.client_data import client_features
from fedsb.report.clients import client_spread, spread_text
from tests.strategies.private_runs import EXAMPLE, Watch, asked, ledger_lines, metrics_of, rdp_epsilon, releases, run_privately, small

EVALUATED = ("federation.evaluate_clients=true", "data.client_test_fraction=0.3", "privacy.eval_fraction=0.2")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def test_epsilon_of_a_run_is_that_of_its_trainings_and_evaluations_together(tiny_bert: Path, tmp_path: Path) -> None:
    """Half of the clients train in a round, and evaluate behind it; all evaluate after the last."""
    watch = Watch()
    more = ("privacy=example", "privacy.epsilon=4", *EVALUATED, "federation.fraction=0.5", "train.batch_size=7")
    run = run_privately(small(tiny_bert, tmp_path, *more), tmp_path / "run", app=watch)
    assert run.error is None
    drawn = {client: [record.round for record in run.records if client in record.clients] for client in run.prepared.plans}
    for client, plan in run.prepared.plans.items():
        charges = ledger_lines(run.folder, client)
        trained, evaluated = ([c["key"][1] for c in charges if c["key"][2] == exchange] for exchange in ("train", "evaluate"))
        assert (trained, evaluated) == (drawn[client], sorted({*drawn[client], 2}))
        assert plan.evaluated == tuple(evaluated)
        epsilon = run.records[-1].epsilon
        assert epsilon is not None
        told = epsilon["clients"][client]["epsilon"]
        assert told == pytest.approx(rdp_epsilon(releases(charges)), rel=1e-2)
        assert told <= 4.0
        if drawn[client]:
            assert told > 3.9
        assert rdp_epsilon(releases([c for c in charges if c["key"][2] == "evaluate"])) <= 0.8
    replies = [(asked(message), reply) for message, reply in watch.seen if message.metadata.message_type == "evaluate"]
    assert {client for (client, number), _ in replies if number == 2} == set(run.prepared.plans)
    for (client, number), reply in replies:
        said = metrics_of(reply)
        assert set(said) == {
            *("num-examples", "layout", "accuracy", "clipped_loss", "noise"),
            *("epsilon", "delta", "sampling-rate", "noise-multiplier", "steps"),
        }
        assert said["num-examples"] == 6
        shown = run.records[number].client_metrics[client]
        assert shown == {key: said[key] for key in ("accuracy", "clipped_loss", "noise")}
    assert run.records[-1].held_out == dict.fromkeys(sorted(run.prepared.plans), 6)
    assert client_spread(run.records)["accuracy"]["clients"] == 4
    assert "metrics on held-out examples have noise too" in run.printed
    assert "*noise* is its standard deviation" in spread_text(run.records)


def test_with_next_to_no_noise_they_are_the_metrics_of_a_run_without_privacy(tiny_bert: Path, tmp_path: Path) -> None:
    """And what is held out is drawn by number: other labels leave it as it is."""
    quiet = ("privacy=example", "privacy.noise_multiplier=1e-6", *EVALUATED, "train.batch_size=7", "federation.num_rounds=1")
    run = run_privately(small(tiny_bert, tmp_path, *quiet), tmp_path / "run")
    record = run.records[-1]
    adapted, view = run.prepared.adapted, run.prepared.strategy.frozen.view()
    adapted.install(run.last, view)
    from fedsb.app.assembly import task_of
    from fedsb.models.evaluate import evaluate

    parts = {}
    for client, found in record.client_metrics.items():
        train, held_out = client_features(run.config, client, None, run.prepared.labels)
        parts[client] = [f["input_ids"] for f in held_out]
        assert (len(train), len(held_out)) == (14, 6)
        truth = evaluate(adapted, task_of(run.config), held_out, train=run.config.train)
        assert found["accuracy"] == pytest.approx(truth["accuracy"], abs=1e-4)
        assert found["clipped_loss"] == pytest.approx(truth["loss"], abs=1e-4)


def test_without_a_share_of_epsilon_nothing_is_measured(tiny_bert: Path, tmp_path: Path) -> None:
    """Examples may be held out all the same."""
    run = run_privately(
        small(tiny_bert, tmp_path, *EXAMPLE, "data.client_test_fraction=0.3", "train.batch_size=7", "federation.num_rounds=1"),
        tmp_path / "run",
    )
    assert run.error is None
    assert not any(record.client_metrics for record in run.records)
    assert {plan.num_examples for plan in run.prepared.plans.values()} == {14}
