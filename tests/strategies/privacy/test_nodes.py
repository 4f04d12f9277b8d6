"""Private runs on the nodes of a real federation: ledgers outlive a run, plans follow what nodes say, no simulated node is among them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.core.folders import home
from fedsb.privacy.codes import CODES
from tests.conftest import TOPICS
from tests.strategies.federations import ClientCall, named
from tests.strategies.private_runs import CLIENT, EXAMPLE, Finished, Rewrite, run_privately, small, write_table

FEWER = "federation.min_replies=1"
TWO = ("federation.num_clients=2", "federation.names=[a,b]")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def run(bert: Path, folder: Path, name: str, *more: str, policy: Mapping[str, Any] | None = None) -> Finished:
    """Run over two nodes, each with 20 rows of its own."""
    nodes = {}
    for number, client in enumerate("ab", start=1):
        if not (path := folder / f"{client}.csv").exists():
            write_table(path, 20, own_text(client))
        nodes[number] = named(client, **{"data-path": str(path), **(policy or {})})
    return run_privately(small(bert, folder, *TWO, *more), folder / name, app=in_run(len(list(folder.glob("*/config.yaml")))), nodes=nodes)


def own_text(client: str) -> Rewrite:
    """Return texts that no other client has: shared rows would make one account of two."""
    return lambda i, label: f"{client}{i} {TOPICS[label][i % 5]}"


def in_run(number: int) -> ClientCall:
    """Return the ClientApp in a run of its own: to the same run a client would give the reply that it kept."""

    def call(message: Message, context: Context) -> Message:
        return client_app(message, Context(number, context.node_id, context.node_config, context.state, context.run_config))

    return call


def test_a_ledger_outlives_the_run_and_a_start_without_noise_is_never_forgotten(tiny_bert: Path, tmp_path: Path) -> None:
    first, second = (run(tiny_bert, tmp_path, name, *EXAMPLE) for name in ("one", "two"))
    assert first.claim.epsilon(simulated=False)["max"] < second.claim.epsilon(simulated=False)["max"]
    headers = [json.loads(path.read_text().splitlines()[0]) for path in (home() / "ledgers").glob("*/ledger.jsonl")]
    assert sorted(header["data"] for header in headers) == ["a.csv", "b.csv"]
    bare = run(tiny_bert, tmp_path, "bare", *EXAMPLE, "init.kind=gradient", "init.num_examples=4", "federation.num_rounds=1")
    assert "without noise" in bare.claim.why_none()
    after = run(tiny_bert, tmp_path, "after", *EXAMPLE)
    assert after.claim.epsilon(simulated=False) is None
    assert "infinite: a release of this or an earlier run on that data had no noise" in after.claim.why_none()
    assert after.records[-1].epsilon_reason == after.claim.why_none()


def test_a_budget_is_held_over_all_runs(tiny_bert: Path, tmp_path: Path) -> None:
    spent = run(tiny_bert, tmp_path, "one", *EXAMPLE).claim.epsilon(simulated=False)["max"]
    again = run(tiny_bert, tmp_path, "two", *EXAMPLE, f"privacy.max_epsilon={spent * 1.01}")
    assert isinstance(again.error, RunError)
    assert CODES["budget"].text in str(again.error)


def test_the_operators_budget_holds_whatever_the_run_says(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At the operator's delta: the run's own, a larger one, would make the same releases fit."""
    loose = (*EXAMPLE, "federation.num_rounds=1", "privacy.delta=0.01")
    found = run(tiny_bert, tmp_path, "one", *loose).claim.epsilon(simulated=False)["max"]
    strict = {"privacy": "example", "max-epsilon": found * 2.5, "max-delta": "1e-9"}
    again = run(tiny_bert, tmp_path, "two", *loose, policy=strict)
    assert isinstance(again.error, RunError)
    assert CODES["budget"].text in str(again.error)
    assert f"the node's max_epsilon={found * 2.5:g} would be exceeded" in caplog.text
    assert "at delta 1e-09" in caplog.text
    wide = run(tiny_bert, tmp_path, "three", *loose, policy={**strict, "max-delta": 0.01})
    assert wide.error is None


def test_the_plans_follow_what_the_nodes_hold(tiny_bert: Path, tmp_path: Path) -> None:
    """The server's own table is dealt out to nobody."""
    found = run(tiny_bert, tmp_path, "one", *EXAMPLE, "federation.num_rounds=1")
    assert {client: plan.num_examples for client, plan in found.prepared.plans.items()} == {"a": 20, "b": 20}


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT])
def test_simulated_nodes_beside_real_ones_are_refused(privacy: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.csv", 20)
    nodes = {1: named("a", **{"data-path": str(path)}), 2: {"partition-id": 0, "num-partitions": 1}}
    overrides = small(tiny_bert, tmp_path, *TWO, *privacy)
    if privacy is CLIENT:
        assert "some nodes of this private run name the client" in str(run_privately(overrides, tmp_path / "run", nodes=nodes).error)
    else:
        with pytest.raises(RunError, match="some nodes of this private run name the client"):
            run_privately(overrides, tmp_path / "run", nodes=nodes)
        assert not (tmp_path / "run").exists()


def test_a_node_that_cannot_describe_itself_says_so_by_its_code(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_table(tmp_path / "b.csv", 20)
    nodes = {1: named("a", **{"data-path": str(tmp_path / "absent.csv")}), 2: named("b", **{"data-path": str(path)})}
    with caplog.at_level(logging.WARNING):
        run_privately(small(tiny_bert, tmp_path, *TWO, *EXAMPLE, "federation.num_rounds=1", FEWER), tmp_path / "run", nodes=nodes)
    assert f"node 1 did not describe itself: code 3, {CODES['refused'].text} (key at fault: data-path)" in caplog.text
    assert "absent.csv" not in "".join(record.getMessage() for record in caplog.records if record.name.startswith("strategies"))
