"""A sweep that is run again: what has finished stays, what was cut off goes on to the same bits, and the table tells of each job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsb.commands.sweep import CUT, FINISHED, JOBS, NEW, endings, going_on, label_jobs, run_noted, tell
from fedsb.core.errors import RunError, UserError
from fedsb.run.folder import read_run
from tests.commands.calls import Call, first_line

GRID = ("seed=0,1", "federation.num_rounds=2", "output=sweep")


def bits(folder: Path) -> dict[str, str]:
    return {path.parent.name: json.loads(path.read_text())["factors_sha256"] for path in folder.glob("*/summary.json")}


def cut_off(folder: Path) -> None:
    """Leave of a finished run what a kill after its first round leaves."""
    for name in ("summary.json", "report.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoints" / "round-0002.safetensors").unlink()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_left(call: Call, quick: list[str]) -> None:
    status, out, err = call("run", "-m", *quick, *GRID, "progress=lines")
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith("job ")] == ["job 1 of 2: seed=0", "job 2 of 2: seed=1"]
    left_alone, stamp = bits(Path("sweep")), Path("sweep/0/summary.json").stat().st_mtime_ns
    cut_off(Path("sweep/1"))
    status, out, err = call("run", "-m", *quick, *GRID, "progress=lines")
    assert status == 0, err
    assert "job 1 of 2: seed=0, which had finished" in out
    assert "job 2 of 2: seed=1, which goes on" in out
    assert "resumed after round 1" in out
    assert bits(Path("sweep")) == left_alone
    assert Path("sweep/0/summary.json").stat().st_mtime_ns == stamp
    assert {number: ending.skipped for number, ending in endings(Path("sweep")).items()} == {0: True, 1: False}


@pytest.mark.slow
def test_a_job_that_fails_is_told_of_and_the_others_run(call: Call, quick: list[str]) -> None:
    status, out, err = call("run", "-m", *quick, "federation.timeout=1e-9,60", "federation.num_rounds=1", "output=sweep")
    assert status == 1
    rows = json.loads(out.splitlines()[-1])["jobs"]
    assert [(row["varies"], row["state"], row["status"]) for row in rows] == [
        ("federation.timeout=1e-09", "failed", 1),
        ("federation.timeout=60", "finished", 0),
    ]
    assert rows[0]["note"]
    assert rows[1]["metrics"]["accuracy"] == read_run("sweep/1").summary["metrics"]["accuracy"]
    assert err.splitlines()[-1].startswith("go on with: fedsb run -m ")


@pytest.mark.slow
def test_another_grid_in_the_same_folder_is_a_mistake_before_anything_runs(call: Call, quick: list[str]) -> None:
    assert call("run", "-m", *quick, *GRID, "method=head_only")[0] == 0
    status, _, err = call("run", "-m", *quick, *GRID, "method=head_only", "train.lr=0.5")
    assert status == 2
    assert "'sweep/0' holds a job of another sweep (" in first_line(err)
    assert "train.lr=" in err


def test_a_job_is_named_by_what_varies() -> None:
    jobs = [["a=1", "b=x", "c=7"], ["a=1", "b=y", "c=7"], ["a=1", "b=x", "c=8"]]
    assert [job.label for job in label_jobs(jobs)] == ["b=x c=7", "b=y c=7", "b=x c=8"]
    assert label_jobs([["a=1"]])[0].label == "the only job"


def test_a_job_goes_on_with_its_own_overrides() -> None:
    assert going_on(["rank=8", "output=x", "seed=1"], Path("/a b/1")) == ["rank=8", "seed=1", "resume='/a b/1'"]


def raises(error: BaseException):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (UserError("no such thing"), 2, "no such thing"),
        (RunError("too few"), 1, "too few"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("by zero\nhere"), 1, "ZeroDivisionError: by zero here"),
    ],
)
def test_how_a_job_ended_is_on_the_disk(tmp_path: Path, capsys, error: BaseException, status: int, reason: str) -> None:
    job = label_jobs([["a=1"], ["a=2"]])[1]
    ending = run_noted(tmp_path, job, 2, NEW, raises(error), progress="lines")
    assert endings(tmp_path) == {1: ending}
    assert (ending.status, ending.reason) == (status, reason)
    with (tmp_path / JOBS).open("a") as file:
        file.write('{"job": 0, "la')  # a process that was killed while it wrote
    assert endings(tmp_path) == {1: ending}
    again = run_noted(tmp_path, job, 2, CUT, lambda: None, progress="lines")
    assert endings(tmp_path) == {1: again}
    assert not run_noted(tmp_path, job, 2, FINISHED, raises(error), progress="lines").status


def test_a_job_that_never_ran_stands_in_the_table_too(tmp_path: Path, capsys) -> None:
    jobs = label_jobs([["a=1"], ["a=2"]])
    run_noted(tmp_path, jobs[0], 2, NEW, raises(KeyboardInterrupt()), progress="lines")
    tell(tmp_path, jobs, ["-m", "a=1,2", "output=x"], progress="lines")
    out, err = capsys.readouterr()
    assert "interrupted" in out
    assert "not run" in out
    assert err.splitlines()[-1] == f"go on with: fedsb run -m a=1,2 output={tmp_path}"
