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
