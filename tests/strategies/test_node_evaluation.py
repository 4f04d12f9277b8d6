"""What nodes evaluate on is their operators': a file of its own, a share of the rows, or nothing; and ledgers know all of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsb.app.assembly import features_of, task_of
from fedsb.core.folders import home
from fedsb.data import load_site
from fedsb.models.evaluate import evaluate
from fedsb.privacy.codes import CODES
from fedsb.report.clients import client_spread
from tests.strategies.privacy.test_node_files import node_file, run
from tests.strategies.privacy.test_nodes import own_text
from tests.strategies.private_runs import EXAMPLE, Finished, write_table

ASKED = ("data.path=null", "federation.evaluate_clients=true", "federation.num_rounds=1")
PRIVATE = (*EXAMPLE, "privacy.eval_fraction=0.1")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def evaluated(bert: Path, folder: Path, *more: str, b: dict[str, Any]) -> Finished:
    """Run over two nodes with 20 rows each, one of which has a file of 9 more to evaluate on."""
    write_table(folder / "apart.csv", 9, own_text("apart"))
    nodes = {1: node_file(folder, "a", data={"test_path": "apart.csv"}), 2: node_file(folder, "b", **b)}
    return run(bert, folder, "run", nodes, *ASKED, *more)


def test_each_node_evaluates_on_its_own_part_and_trains_on_the_rest(tiny_bert: Path, tmp_path: Path) -> None:
    done = evaluated(tiny_bert, tmp_path, b={"data": {"test_fraction": 0.25}})
    record = done.records[-1]
    assert (done.error, record.failed) == (None, {})
    assert done.prepared.strategy.counts == {"a": 20, "b": 15}
    assert record.held_out == {"a": 9, "b": 5}
    adapted = done.prepared.adapted
    adapted.install(done.last, done.prepared.strategy.frozen.view())
    apart = features_of(done.config, load_site(done.config.data, str(tmp_path / "apart.csv"), done.prepared.labels))
    truth = evaluate(adapted, task_of(done.config), apart, train=done.config.train)
    assert record.client_metrics["a"] == pytest.approx(truth)
    own = {client: row["accuracy"] for client, row in record.client_metrics.items()}
    shown = client_spread(done.records)["accuracy"]
    assert shown["weighted"] == pytest.approx((9 * own["a"] + 5 * own["b"]) / 14)
    assert shown["mean"] == pytest.approx((own["a"] + own["b"]) / 2)


@pytest.mark.parametrize("privacy", [(), PRIVATE])
def test_a_node_that_evaluates_nothing_trains_all_the_same(privacy: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    done = evaluated(tiny_bert, tmp_path, *privacy, b={"evaluate": False})
    record = done.records[-1]
    assert done.error is None
    assert record.clients == ("a", "b")
    code = CODES["policy"].text
    assert record.failed == {"b": f"evaluation: {code} (key at fault: federation.evaluate_clients)"}
    assert record.held_out == {"a": 9}
    assert "this node evaluates nothing" in (home() / "node.log").read_text()
    if privacy:
        lines = [line for path in (home() / "ledgers").glob("*/ledger.jsonl") for line in path.read_text().splitlines()[1:]]
        keys = [json.loads(line)["key"][2:] for line in lines]
        assert sorted(map(tuple, keys)) == [("evaluate", "a"), ("train", "a"), ("train", "b")]


def test_a_row_that_another_node_holds_out_joins_their_ledgers(tiny_bert: Path, tmp_path: Path) -> None:
    """What is held out is in the account of the node's data, so whoever has it too is charged for it."""
    write_table(tmp_path / "b.csv", 20, lambda i, label: own_text("apart")(i, label) if i == 3 else own_text("b")(i, label))
    done = evaluated(tiny_bert, tmp_path, *PRIVATE, b={"evaluate": False})
    assert done.error is None
    assert (home() / "ledgers" / "joined.jsonl").read_text().count("ledgers") == 1
