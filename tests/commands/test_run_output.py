"""A run leaves its folder, says what it does as lines or JSON, and has status 1 where it stops, with the round that stopped it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.commands.calls import Call, first_line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_plots_can_wait_for_the_report(call: Call, quick: list[str], tmp_path: Path) -> None:
    assert call("run", *quick, "federation.num_rounds=1", "output=run")[0] == 0
    assert "](" not in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("run/*.png"))
    assert call("report", "run")[0] == 0
    assert "](quality.png)" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert len(list(tmp_path.glob("run/*.png"))) == 4


def test_a_run_leaves_its_folder_and_another_one_does_not_touch_it(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, out, _ = call("run", *quick, "plots=true", "output=run")
    assert status == 0
    assert "accuracy" in out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["exactness_gap"] < 1e-5
    assert len((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 3  # before the first round, and two
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "adapter", "report.md", "run.log"}

    before = contents(folder)
    status, _, err = call("run", *quick, "output=run", "seed=1")
    assert status == 2
    assert "run' already holds a run (config.yaml); choose another output=…" in first_line(err)
    assert contents(folder) == before


STORY = [
    " INFO run on ", " INFO method fed_sb, rank 2", " INFO 3 clients, fraction 1, 2 rounds", " INFO privacy none", " INFO round 0/2 ",
    " INFO round 1/2 ", " WARNING round 1: client-0 failed: ", " INFO round 2/2 ", " INFO after round 2: loss ", " INFO finished: ",
]  # fmt: skip


@pytest.mark.parametrize("level", ["info", "warning"])
def test_the_log_tells_the_story_of_a_run_from_start_to_end_or_its_failures_alone(
    level: str, call: Call, quick: list[str], tmp_path: Path
) -> None:
    faults = ("faults.dropout=0.6", "federation.min_replies=1", "init.kind=weight_svd")
    status, _, err = call("run", *quick, *faults, f"log_level={level}", "output=run")
    assert status == 0
    assert " failed: " not in err  # each round's line on the screen says so
    lines = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").splitlines()
    wanted = [part for part in STORY if level == "info" or " WARNING " in part]
    places = [next((i for i, line in enumerate(lines) if part in line), -1) for part in wanted]
    assert -1 not in places
    assert places == sorted(places)
    if level == "warning":
        assert all(" WARNING " in line and "stayed away (faults.dropout)" in line for line in lines)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    failures = [f"round {row['round']}: {who} failed: {why}" for row in records for who, why in row["failed"].items()]
    assert [line.partition(" WARNING ")[2] for line in lines if " failed: " in line and " WARNING " in line] == failures


@pytest.mark.parametrize(("tokens", "told"), [(6, True), (16, False)])
def test_a_run_says_how_many_texts_it_cuts(call: Call, quick: list[str], tokens: int, told: bool) -> None:
    status, out, _ = call("run", *quick, "federation.num_rounds=1", f"train.max_length={tokens}")
    assert status == 0
    assert "3 classes: 'film', 'sport', 'trade'" in out
    assert (f"% of the training texts are longer than train.max_length={tokens} tokens" in out) is told


@pytest.mark.parametrize(("terminal", "asked", "speaks"), [
    (False, (), "json"), (True, (), "lines"), (False, ("progress=lines",), "lines"), (True, ("progress=json",), "json"),
])  # fmt: skip
def test_a_pipe_gets_json_and_a_terminal_lines_unless_told_otherwise(
    terminal: bool, asked: tuple[str, ...], speaks: str, call: Call, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    status, out, _ = call("run", *quick, "federation.num_rounds=1", "output=run", *asked)
    assert status == 0
    assert ("round 1/1" in out) is (speaks == "lines")
    assert all(line.startswith("{") for line in out.splitlines()) is (speaks == "json")
    # What stdout was is no property of the run, and may be another thing when it is resumed.
    assert f"progress: {asked[0].split('=')[1] if asked else 'auto'}\n" in Path("run/config.yaml").read_text()


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=0,1")], ids=["one", "sweep"])
def test_with_json_nothing_else_is_on_standard_output(call: Call, quick: list[str], sweep: tuple[str, ...]) -> None:
    private = ["privacy=example", "privacy.epsilon=50", "privacy.accountant=rdp", "init.kind=weight_svd", "train.batch_size=4"]
    status, out, err = call("run", *quick, *private, "federation.num_rounds=1", "progress=json", *sweep)
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert sum("summary" in row for row in rows) == (2 if sweep else 1)
    for remark in ("loading model and data …", "privacy: calibrating the noise of 3 clients …"):
        assert sum(row.get("remark") == remark for row in rows) == (2 if sweep else 1)
    assert "{" not in err


def test_a_run_that_stops_has_status_1(call: Call, quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit that no client can keep."""
    status, _, err = call("run", *quick, "federation.timeout=1e-9", "output=run")
    assert status == 1
    assert next(line for line in err.splitlines() if line.startswith("error:")).startswith("error: the run stopped: ")


def test_the_round_that_stops_a_run_is_on_record(call: Call, quick: list[str]) -> None:
    status, _, err = call("run", *quick, "train.lr=1e30", "output=run")
    assert status == 1
    assert err.splitlines()[-1].startswith("error: the run stopped: round ")
    last = json.loads(Path("run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert last["round"] > 0
    assert set(last["failed"]) == {"client-0", "client-1", "client-2"}
    assert call("report", "run")[0] == 0
