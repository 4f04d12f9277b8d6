"""A sweep that is run again: what has finished stays, what was cut off goes on to the same bits, and the table tells of each job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fedsb.commands.job import run_noted
from fedsb.core.errors import RunError, UserError
from fedsb.run.folder import read_run
from fedsb.sweep.endings import JOBS, Ending, endings, note
from fedsb.sweep.jobs import label_jobs
from fedsb.sweep.manifest import held
from fedsb.sweep.telling import tell
from tests.commands.calls import Call, first_line

GRID = ("seed=0,1", "federation.num_rounds=2", "output=sweep")


def bits(folder: Path) -> dict[str, str]:
    found = [path for path in folder.glob("*/summary.json") if ".damaged-" not in path.parent.name]
    return {path.parent.name: json.loads(path.read_text())["factors_sha256"] for path in found}


def manifest(folder: Path = Path("sweep")) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def states(folder: Path = Path("sweep")) -> dict[str, str]:
    return {row["name"]: row["state"] for row in manifest(folder)["jobs"]}


def cut_off(folder: Path) -> None:
    """Leave of a finished run what a kill after its first round leaves."""
    for name in ("summary.json", "report.md"):
        (folder / name).unlink()
    shutil.rmtree(folder / "adapter")
    (folder / "checkpoints" / "round-0002.safetensors").unlink()


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_was_left(call: Call, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same command, or by its folder alone, from wherever."""
    status, out, err = call("run", "-m", *quick, *GRID, "progress=lines")
    assert status == 0, err
    assert [line for line in out.splitlines() if line.startswith("job ")] == ["job 1 of 2: seed=0", "job 2 of 2: seed=1"]
    assert states() == {"seed=0": "finished", "seed=1": "finished"}
    left_alone, stamp = bits(Path("sweep")), Path("sweep/seed=0/summary.json").stat().st_mtime_ns
    for again in ([*quick, *GRID, "progress=lines"], [f"resume={tmp_path}/sweep", "progress=lines"]):
        cut_off(tmp_path / "sweep/seed=1")
        status, out, err = call("run", "-m", *again)
        assert status == 0, err
        assert "job 1 of 2: seed=0, which had finished" in out
        assert "job 2 of 2: seed=1, which goes on" in out
        assert "resumed after round 1" in out
        assert bits(tmp_path / "sweep") == left_alone
        assert (tmp_path / "sweep/seed=0/summary.json").stat().st_mtime_ns == stamp
        assert {number: ending.skipped for number, ending in endings(tmp_path / "sweep").items()} == {0: True, 1: False}
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")


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
    assert rows[1]["metrics"]["accuracy"] == read_run("sweep/timeout=60").summary["metrics"]["accuracy"]
    assert err.splitlines()[-1] == "go on with: fedsb run -m resume=sweep"
    (failed, _) = manifest()["jobs"]
    assert (failed["state"], failed["status"], failed["reason"]) == ("failed", 1, rows[0]["note"])


@pytest.mark.slow
def test_a_folder_takes_no_other_sweep_code_or_data(call: Call, quick: list[str], tiny_csv: Path, tmp_path: Path) -> None:
    """One line before anything runs, whichever of them is another; and nothing in the folder has changed."""
    table = shutil.copy(tiny_csv, tmp_path / "own.csv")
    own = [*(text for text in quick if not text.startswith("data.path=")), f"data.path={table}", "method=head_only"]
    assert call("run", "-m", *own, *GRID)[0] == 0
    before = {path: path.read_bytes() for path in Path("sweep").rglob("*") if path.is_file()}

    def refused(*arguments: str) -> str:
        status, _, err = call("run", "-m", *arguments)
        assert status == 2
        assert {path: path.read_bytes() for path in Path("sweep").rglob("*") if path.is_file()} == before
        return first_line(err)

    assert "holds a sweep of another grid (seed=0,1)" in refused(*own, "seed=0,1,2", "output=sweep")
    assert "holds another sweep (job seed=0 has other settings there)" in refused(*own, *GRID, "train.lr=0.5")
    assert "its grid is its own; leave out train.lr=0.5" in refused("resume=sweep", "train.lr=0.5")
    assert "leave output out" in refused("resume=sweep", "output=sweep")
    assert "that is a run, and no sweep; leave -m out" in refused("resume=sweep/seed=0")
    assert "holds no sweep (manifest.json is missing)" in refused("resume=nowhere")
    with held(Path("sweep")):
        assert "is under way in another process" in refused("resume=sweep")
    with table.open("a") as file:
        file.write("one more,a\n")
    assert f"was begun with other data ({table}: " in refused("resume=sweep")
    shutil.copy(tiny_csv, table)
    told = manifest()
    for key, value in (("code", "0" * 64), ("versions", {**told["versions"], "torch": "1.0"})):
        Path("sweep/manifest.json").write_text(json.dumps({**told, key: value}))
        before[Path("sweep/manifest.json")] = Path("sweep/manifest.json").read_bytes()
        assert "was begun with other code (" in refused("resume=sweep")
    Path("sweep/manifest.json").write_text("{")
    before[Path("sweep/manifest.json")] = b"{"
    assert "can't be read" in refused("resume=sweep")
    status, _, err = call("run", "resume=sweep")
    assert (status, "that is a sweep; add -m" in first_line(err)) == (2, True)


@pytest.mark.slow
def test_what_is_damaged_is_set_aside_and_runs_again(call: Call, quick: list[str]) -> None:
    """A configuration that was changed, a summary or records that were cut off, checkpoints of which none can be read: to the same bits."""
    assert call("run", "-m", *quick, "seed=0,1,2,3", "method=head_only", "output=sweep")[0] == 0
    sound = bits(Path("sweep"))
    with Path("sweep/seed=0/config.yaml").open("a") as file:
        file.write("seed: 7\n")
    Path("sweep/seed=1/summary.json").write_text('{"rou')
    lines = Path("sweep/seed=2/metrics.jsonl").read_text().splitlines()
    Path("sweep/seed=2/metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    Path("sweep/seed=3/summary.json").unlink()
    for path in Path("sweep/seed=3/checkpoints").glob("round-*"):
        path.write_bytes(path.read_bytes()[:-3])
    kept = {path.name: path.read_bytes() for path in Path("sweep/seed=1").iterdir() if path.is_file()}
    status, out, err = call("run", "-m", "resume=sweep", "progress=lines")
    assert status == 0, err
    assert [line for line in out.splitlines() if "is damaged" in line] == [
        line for line in out.splitlines() if line.endswith("and the job runs again")
    ]
    assert sum("is damaged" in line for line in out.splitlines()) == 4
    assert {path.name for path in Path("sweep").glob("*.damaged-1")} == {f"seed={i}.damaged-1" for i in range(4)}
    assert {path.name: path.read_bytes() for path in Path("sweep/seed=1.damaged-1").iterdir() if path.is_file()} == kept
    assert bits(Path("sweep")) == sound
    assert call("report", "sweep")[0] == 0
    assert "damaged" not in Path("sweep/comparison.csv").read_text()


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
    ending = run_noted(tmp_path, job, raises(error))
    assert endings(tmp_path) == {1: ending}
    assert (ending.status, ending.reason) == (status, reason)
    with (tmp_path / JOBS).open("a") as file:
        file.write('{"job": 0, "la')  # a process that was killed while it wrote
    assert endings(tmp_path) == {1: ending}
    with (tmp_path / JOBS).open("ab") as file:
        file.write(b'bel": \n[]\n{}\n\0\xff\n')  # and what no process writes
    assert endings(tmp_path) == {1: ending}
    again = run_noted(tmp_path, job, lambda: None)
    assert endings(tmp_path) == {1: again}


def test_a_job_that_never_ran_stands_in_the_table_too(tmp_path: Path, capsys) -> None:
    jobs = label_jobs([["a=1"], ["a=2"], ["a=3"]])
    run_noted(tmp_path, jobs[0], raises(KeyboardInterrupt()))
    note(tmp_path, Ending(2, "a=3", 137, "killed by SIGKILL"))
    tell(tmp_path, jobs, progress="lines")
    out, err = capsys.readouterr()
    assert "interrupted" in out
    assert "waiting" in out
    assert "failed" in out
    assert "137" in out
    assert err.splitlines()[-1] == f"go on with: fedsb run -m resume={tmp_path}"
