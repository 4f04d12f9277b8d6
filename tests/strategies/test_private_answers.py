"""What a node answers under example-level privacy tells nothing of a single row: one flipped to anything changes no kind and no figure."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.assembly import _MEMO
from fedsb.client_app import app as client_app
from fedsb.folders import home
from tests.strategies.federations import KeepingGrid, named
from tests.strategies.private_runs import EXAMPLE, Watch, metrics_of, run_privately, small

TASKS: dict[str, tuple[tuple[str, ...], list[Any]]] = {
    "classification": (("data.labels=[film,sport,trade]",), ["film", "sport", "trade"]),
    "regression": (("data.task=regression",), [0.5, -100.0, 3]),
}
ODD: dict[str, Any] = {
    "another label": {"text": "he said", "label": "hiv"},
    "no label": {"text": "he said", "label": None},
    "an empty text": {"text": "", "label": "film"},
    "a number": {"text": 3, "label": 3},
    "not a number": {"text": "he said", "label": float("nan")},
    "beyond float32": {"text": "he said", "label": 1e300},
    "gigantic": {"text": "goal " * 200_000, "label": "film"},
    "no object": "he said",
}
NUMBERS = ("no label", "not a number", "beyond float32")


def answers(
    bert: Path, folder: Path, number: int, task: str, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, set[str], dict[str, Any]]]:
    """Return the kind, the records and the figures of each reply of a node's first run on its data, one line of them replaced."""
    more, targets = TASKS[task]
    folder = folder / str(number)
    folder.mkdir()
    monkeypatch.setenv("FEDSB_HOME", str(folder / "home"))  # a home of its own: rows that are shared make one account
    lines = [json.dumps({"text": f"a new goal {i}", "label": targets[i % 3]}) for i in range(20)]
    (folder / "a.jsonl").write_text("".join(f"{row}\n" for row in [*lines[:7], lines[7] if line is None else line, *lines[8:]]))
    test = folder / "test.jsonl"
    test.write_text("".join(f"{row}\n" for row in lines))
    one = ("federation.num_clients=1", "federation.names=[a]", "federation.num_rounds=1", f"data.test_path='{test}'", "data.path=null")
    watch = Watch(
        lambda message, context: client_app(
            message, Context(number, context.node_id, context.node_config, context.state, context.run_config)
        )
    )
    for kind in ("features", "private site"):
        _MEMO.pop(kind, None)
    overrides = [word for word in small(bert, folder, *EXAMPLE, *more) if not word.startswith("data.path")]
    with pytest.MonkeyPatch.context() as patch:
        # A node of its own: rows that lie at two paths of one node have one account.
        patch.setenv("FEDSB_HOME", str(folder / "home"))
        run_privately([*overrides, *one], folder / "run", app=watch, nodes={1: named("a", **{"data-path": str(folder / "a.jsonl")})})
    return [(message.metadata.message_type, set(reply.content), metrics_of(reply)) for message, reply in watch.seen]


@pytest.mark.parametrize("task", TASKS)
def test_a_row_flipped_to_anything_changes_no_kind_and_no_figure_of_a_reply(
    task: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = answers(tiny_bert, tmp_path, 1, task, None, monkeypatch)
    assert [kind for kind, *_ in said] == ["query.describe", "train"]
    assert said[0][2] == {"num-examples": [20]}
    assert said[1][1] == {"arrays", "metrics"}
    odd = [json.dumps(row) for what, row in ODD.items() if task == "classification" or what in NUMBERS]
    for number, row in enumerate((*odd, "{"), start=2):
        assert answers(tiny_bert, tmp_path, number, task, row, monkeypatch) == said


def test_a_question_about_labels_is_answered_with_the_number_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the server calls the classes, and nothing is charged for it."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    lines = [json.dumps({"text": "he said", "label": "hiv" if i == 9 else "flu"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    node = named("a", **{"data-path": str(tmp_path / "a.jsonl")})
    for labels in ("flu", "hiv", "cancer"):
        for column in ("label", "elsewhere"):
            over = [
                "data=files",
                "federation.names=[a]",
                "federation.num_clients=1",
                *EXAMPLE,
                f"data.labels=[x,{labels}]",
                f"data.label={column}",
            ]
            grid = KeepingGrid(client_app, {"overrides": join(over)}, {1: node})
            ask = Message(RecordDict({"config": ConfigRecord({"clients": "[]", "labels": json.dumps(["x", labels])})}), 1, "query.describe")
            [reply] = grid.send_and_receive([ask], timeout=60)
            assert metrics_of(reply) == {"num-examples": [20]}
    assert not (home() / "ledgers").exists()
