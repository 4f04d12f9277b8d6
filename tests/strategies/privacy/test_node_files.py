"""Whole federations over nodes that ``node.yaml`` configures: the bits of plain ones, budgets of a run, and a time that is over."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsb.core.errors import RunError
from fedsb.core.folders import home
from fedsb.models.content import content_hash
from fedsb.node.reading import FILE
from fedsb.privacy.codes import CODES
from tests.strategies.federations import named
from tests.strategies.privacy.test_nodes import in_run, own_text
from tests.strategies.private_runs import EXAMPLE, Finished, run_privately, small, write_table

TWO = ("federation.num_clients=2", "federation.names=[a,b]")


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


def node_file(folder: Path, client: str, **said: Any) -> dict[str, Any]:
    """Return the ``--node-config`` of a node whose table has 20 rows of its own."""
    if not (folder / f"{client}.csv").exists():
        write_table(folder / f"{client}.csv", 20, own_text(client))
    data = {"path": f"{client}.csv", **said.pop("data", {})}
    path = folder / f"{client}.yaml"
    path.write_text(yaml.safe_dump({"client": client, "data": data, **said}), encoding="utf-8")
    return {FILE: str(path)}


def renamed(folder: Path, client: str) -> dict[str, str]:
    """Write a client's table anew under names of its own, and return what its classes are called there."""
    rows = list(csv.DictReader((folder / f"{client}.csv").read_text(encoding="utf-8").splitlines()))
    labels = {label: f"class of {label}" for label in sorted({row["label"] for row in rows})}
    with (folder / f"{client}-own.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "note", "kind"])
        writer.writerows((f"patient {i}", row["text"], labels[row["label"]]) for i, row in enumerate(rows))
    return labels


def run(bert: Path, folder: Path, name: str, nodes: dict[int, dict[str, Any]], *more: str, number: int = 1) -> Finished:
    return run_privately(small(bert, folder, *TWO, *more), folder / name, app=in_run(number), nodes=nodes)


def test_nodes_with_names_of_their_own_end_with_the_same_bits(tiny_bert: Path, tmp_path: Path) -> None:
    """Columns, classes and the model's folder are called otherwise at each node, and the server knows of none of it."""
    for client in "ab":
        node_file(tmp_path, client)
    plain = {i: named(client, **{"data-path": str(tmp_path / f"{client}.csv")}) for i, client in enumerate("ab", start=1)}
    moved = tmp_path / "moved"
    moved.symlink_to(tiny_bert)
    model = {"name": str(tiny_bert), "sha256": content_hash(tiny_bert), "path": str(moved)}
    files = {}
    for i, client in enumerate("ab", start=1):
        own = {"path": f"{client}-own.csv", "text": "note", "label": "kind", "labels": renamed(tmp_path, client)}
        cache = {"folder": f"cache-{client}", "gb": 1}
        files[i] = node_file(tmp_path, client, data=own, models=[model], methods=["fed_sb"], cache=cache, limits={"max_local_steps": 2})
    first = run(tiny_bert, tmp_path, "plain", plain, "federation.num_rounds=1")
    second = run(tiny_bert, tmp_path, "files", files, "federation.num_rounds=1", number=2)
    assert (first.error, second.error) == (None, None)
    assert first.sha256 == second.sha256
    assert list((tmp_path / "cache-a" / "frozen").iterdir())


def test_a_budget_of_a_run_is_held_over_its_rounds_and_anew_in_the_next(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = run(tiny_bert, tmp_path, "one", {i: node_file(tmp_path, c) for i, c in enumerate("ab", 1)}, *EXAMPLE, "federation.num_rounds=1")
    spent = one.claim.epsilon(simulated=False)["max"]
    said = {"privacy": {"unit": "example", "max_epsilon_run": spent * 1.01}}
    nodes = {i: node_file(tmp_path, client, **said) for i, client in enumerate("ab", start=1)}
    two = run(tiny_bert, tmp_path, "two", nodes, *EXAMPLE, number=2)
    assert isinstance(two.error, RunError)
    assert CODES["budget"].text in str(two.error)
    assert "the node's max_epsilon_run=" in caplog.text
    assert "of this run at delta" in caplog.text
    # The first round was answered, though the ledger holds another run's release beside.
    assert [sorted(record.failed) for record in two.records] == [[], [], ["a", "b"]]
    assert run(tiny_bert, tmp_path, "three", nodes, *EXAMPLE, "federation.num_rounds=1", number=3).error is None


def charges(folder: Path) -> list[list[Any]]:
    [ledger] = folder.glob("*/ledger.jsonl")
    lines = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()[1:]]
    return [[*line["names"], *line["key"][1:]] for line in lines]


def test_what_was_charged_stays_charged_where_the_time_is_over(tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reply is a code, a repeated request a release of its own, and a model that was left in the midst of a step is not used again."""
    alone = ("federation.num_clients=1", "federation.names=[a]", "federation.num_rounds=1", *EXAMPLE)
    endless, number = (*alone, "train.local_steps=1000000"), 7
    node = {1: node_file(tmp_path, "a", limits={"max_seconds": 2})}
    for count in (1, 2):
        late = run(tiny_bert, tmp_path, f"late-{count}", node, *endless, number=number)
        assert CODES["time"].text in str(late.error)
        assert charges(home() / "ledgers") == [["7", 1, "train", "a"]] * count
    assert "limits.max_seconds of this node is 2, and the time is over" in caplog.text
    assert run(tiny_bert, tmp_path, "after", node, *alone, number=8).error is None
    assert charges(home() / "ledgers") == [["7", 1, "train", "a"]] * 2 + [["8", 1, "train", "a"]]
