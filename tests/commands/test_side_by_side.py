"""Jobs side by side in worker processes: the bits of jobs one by one, and a worker that dies takes one job with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.commands.calls import Call
from tests.commands.test_sweep import bits, manifest, states

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def printed(name: str, folder: Path = Path("sweep")) -> str:
    return (folder / "printed" / f"{name}.txt").read_text(encoding="utf-8")


def test_jobs_side_by_side_have_the_bits_of_jobs_one_by_one(call: Call, quick: list[str]) -> None:
    grid = ("method=fed_sb,fedex_lora", "seed=0,1", "federation.num_rounds=1")
    status, out, err = call("run", "-m", *quick, *grid, "output=abreast", "sweep.jobs=2", "progress=lines")
    assert status == 0, err
    ended = [line for line in out.splitlines() if line.startswith("job ")]
    assert len(ended) == 4
    assert all(": finished in " in line for line in ended)
    assert "4 of 4 done, 0 running, 0 waiting" in ended[-1]
    assert call("run", "-m", *quick, *grid, "output=single")[0] == 0
    assert bits(Path("abreast")) == bits(Path("single"))
    assert len(set(bits(Path("abreast")).values())) == 4
    assert "round 1/1" in printed("method=fed_sb+seed=0", Path("abreast"))


def test_a_worker_that_dies_takes_one_job_with_it_and_sigterm_ends_all(quick: list[str], tmp_path: Path) -> None:
    """Killed as by a system that is out of memory; what a mistake ends is told beside."""
    folder = tmp_path / "sweep"
    grid = ("seed=0,1", "federation.num_rounds=2,400", "rank=2,33")
    sweep = start(tmp_path, "run", "-m", *quick, *grid, "output=sweep", "sweep.jobs=2")
    victim, name = [], "rank=2+num_rounds=400+seed=0"
    wait_for(lambda: victim.extend(held_by(workers(sweep), folder / name)) or victim, sweep)
    victim[0].kill()
    wait_for(lambda: states(folder)["rank=2+num_rounds=2+seed=1"] == "finished", sweep)
    rows = {row["name"]: row for row in manifest(folder)["jobs"]}
    assert (rows[name]["state"], rows[name]["status"]) == ("failed", 137)
    assert rows[name]["reason"].startswith("its process was ended by SIGKILL")
    assert rows["rank=33+num_rounds=2+seed=0"]["status"] == 2
    assert rows["rank=33+num_rounds=2+seed=0"]["reason"].startswith("rank (33) exceeds")
    wait_for(lambda: held_by(workers(sweep), folder / "rank=2+num_rounds=400+seed=1"), sweep)
    there = workers(sweep)
    sweep.send_signal(signal.SIGTERM)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 143, err
    assert "go on with: fedsb run -m resume=sweep" in err
    assert "interrupted" in states(folder).values()
    assert json.loads(out.splitlines()[-1])["sweep"] == "sweep"
    assert not psutil.wait_procs(there, timeout=10)[1]


def test_a_sweep_that_is_killed_three_times_runs_every_job_once_to_the_same_bits(call: Call, quick: list[str], tmp_path: Path) -> None:
    """Before a job, in the middle of one, and between two: with one job at a time, and with two."""
    grid = (*quick, "seed=0,1,2", "federation.num_rounds=25")
    assert call("run", "-m", *grid, "output=whole")[0] == 0
    folder, whole = tmp_path / "sweep", bits(tmp_path / "whole")
    points = [
        (("output=sweep", *grid), lambda: (folder / "manifest.json").is_file()),
        (("resume=sweep", "sweep.jobs=2"), lambda: list(folder.glob("*/checkpoints/round-0003*"))),
        (("resume=sweep",), lambda: list(folder.glob("*/summary.json"))),
    ]
    for arguments, there in points:
        sweep = start(tmp_path, "run", "-m", *arguments)
        wait_for(there, sweep)
        left = workers(sweep)
        sweep.kill()
        sweep.communicate()
        assert not psutil.wait_procs(left, timeout=10)[1]
        assert (folder / "manifest.json").is_file()
    assert 0 < len(bits(folder)) < 3
    assert call("run", "-m", "resume=sweep", "sweep.jobs=2")[0] == 0
    assert bits(folder) == whole
    ended = [json.loads(line) for line in (folder / "jobs.jsonl").read_text().splitlines()]
    ran = [row["job"] for row in ended if not row["skipped"]]
    # One whose summary was written, and whose process was killed before it could say so, is found finished.
    assert sorted({*ran, *(row["job"] for row in ended)}) == [0, 1, 2]
    assert len(set(ran)) == len(ran)
    assert set(states(folder).values()) == {"finished"}


def test_hydras_joblib_launcher_runs_the_jobs_that_are_left(call: Call, quick: list[str], tmp_path: Path) -> None:
    """The real one, in processes of its own: it is told numbers, so that any grid and any folder go through it."""
    grid = (*quick, "federation.num_rounds=1", "sweep.grid=[['method=fed_sb','seed=0,1'],['method=head_only','seed=5']]")
    own = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    sweep = start(tmp_path, "run", "-m", *grid, *own, "output=sweep")
    out, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["jobs"][2]["state"] == "finished"
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert folders == {"method=fed_sb+seed=0", "method=fed_sb+seed=1", "method=head_only+seed=5"}
    assert call("run", "-m", *grid, "output=whole")[0] == 0
    assert bits(tmp_path / "sweep") == bits(tmp_path / "whole")
    (tmp_path / "sweep" / "method=head_only+seed=5" / "summary.json").unlink()
    sweep = start(tmp_path, "run", "-m", "resume=sweep", *own)
    _, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 0, err
    assert bits(tmp_path / "sweep") == bits(tmp_path / "whole")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "FEDSB_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fedsb.cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def held_by(processes: list[psutil.Process], folder: Path) -> list[psutil.Process]:
    """Return those that have a run's configuration open, as who runs it does."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found += [process for file in process.open_files() if Path(file.path) == folder / "config.yaml"]
    return found


def wait_for(condition, process: subprocess.Popen[str], timeout: float = 200.0) -> None:
    ends = time.monotonic() + timeout
    while not _true(condition):
        assert process.poll() is None or _true(condition), process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.05)


def _true(condition) -> bool:
    try:
        return bool(condition())
    except (OSError, ValueError, KeyError):
        return False
