"""Flags and overrides stand in any order, and a fresh process ends as a call in this one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsb import cli
from fedsb.cli import main
from fedsb.commands.flags import flags_in, overrides_in
from fedsb.config.overrides import sweep_jobs
from fedsb.core.errors import UserError
from tests.commands.calls import Call, first_line

ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_is_shown_and_nothing_run(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, out, _ = call("run", "--cfg", "job", *quick, "rank=3")
    assert status == 0
    assert "num_rounds: 2" in out
    assert "rank: 3" in out
    assert not list(tmp_path.glob("**/config.yaml"))


@pytest.mark.slow
def test_a_sweep_leaves_a_folder_a_job(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, _ = call("run", "-m", "method=fedavg_lora,fedex_lora,fed_sb", *quick, "federation.num_rounds=1")
    assert status == 0
    found = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["method"] for path in tmp_path.glob("multirun/*/*/*/summary.json")
    }
    assert found == {f"method={name}": name for name in ("fedavg_lora", "fedex_lora", "fed_sb")}


def test_costs_are_printed(call: Call, quick: list[str]) -> None:
    status, out, _ = call("cost", *quick)
    assert status == 0
    for name in ("fed_sb", "fedavg_lora", "fedex_lora", "one-off"):
        assert name in out


def test_without_a_command_the_usage_is_shown(call: Call) -> None:
    assert call() == (2, f"{cli.USAGE}\n", "")
    assert call("--help") == (0, f"{cli.USAGE}\n", "")


def test_overrides_are_told_from_flags() -> None:
    given = ["--cfg", "job", "a=1", "-m", "--package", "x", "b=2"]
    assert overrides_in(given) == ["a=1", "b=2"]
    assert flags_in(given) == ["--cfg", "job", "-m", "--package", "x"]


def test_flags_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra's own parser refuses one between two overrides."""
    with pytest.raises(SystemExit):
        main(["run", "seed=1", "--cfg", "job", "rank=3"])
    assert "seed: 1" in capsys.readouterr().out
    assert sweep_jobs(["a=1,2", "b=[1,2]", "c=x"]) == [["a=1", "b=[1,2]", "c=x"], ["a=2", "b=[1,2]", "c=x"]]
    with pytest.raises(UserError, match=r"cannot read 'a=\['"):
        sweep_jobs(["a=["])


def shell(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a fresh interpreter."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "plugins")])
    environment = {**os.environ, "PYTHONPATH": path, "FEDSB_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fedsb.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
def test_a_fresh_process_runs_and_exits(tmp_path: Path, quick: list[str]) -> None:
    done = shell(tmp_path, "run", *quick, "output=run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_fresh_process_says_a_mistake_in_one_line(tmp_path: Path, quick: list[str]) -> None:
    done = shell(tmp_path, "run", *quick, "rank=33", "output=run")
    assert done.returncode == 2
    assert first_line(done.stderr).startswith("error: rank (33) exceeds")


@pytest.mark.slow
def test_a_job_that_fails_in_another_process_fails_the_sweep(tmp_path: Path, quick: list[str]) -> None:
    """A job that is a mistake counts for more than one that stops; one that ends between them changes nothing."""
    grid = ("rank=2,33", "federation.timeout=1e-9,60")
    done = shell(tmp_path, "run", "-m", *quick, "federation.num_rounds=1", "hydra/launcher=process", "output=sweep", *grid)
    assert done.returncode == 2, done.stderr
    stopped, *mistaken = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert stopped.startswith("error: the run stopped: ")
    assert len(mistaken) == 2
    assert all(line.startswith("error: rank (33) exceeds") for line in mistaken)
    assert "Traceback" not in done.stderr
    noted = [json.loads(line) for line in (tmp_path / "sweep" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [job["status"] for job in noted] == [1, 0, 2, 2]
    assert [path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")] == ["rank=2+timeout=60"]
