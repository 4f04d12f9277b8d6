"""Whole jobs over a Ray cluster: to the bits of one process, and a machine that dies takes its own and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsb.runtime.cluster import RAY_SWITCHES
from tests.commands.calls import Call, first_line
from tests.commands.test_side_by_side import start, wait_for
from tests.commands.test_sweep import bits, manifest, states

ROOT = Path(__file__).resolve().parents[2]
Cluster = subprocess.Popen[str]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start two machines, and end them with all that they have begun."""
    command = [sys.executable, "-m", "tests.commands.two_machines"]
    environment = {**os.environ, **RAY_SWITCHES, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        below = psutil.Process(process.pid).children(recursive=True)
        process.communicate(timeout=60)
    assert not psutil.wait_procs(below, timeout=30)[1]


@pytest.mark.slow
def test_a_machine_that_dies_takes_its_job_with_it_and_no_other(cluster: Cluster, call: Call, quick: list[str], tmp_path: Path) -> None:
    assert cluster.stdout is not None
    assert cluster.stdin is not None
    grid, folder = (*quick, "method=head_only", "federation.num_rounds=150,1", "seed=0,1"), tmp_path / "sweep"
    where = (f"sweep.address={cluster.stdout.readline().strip()}", "sweep.jobs=auto")
    sweep = start(tmp_path, "run", "-m", *grid, *where, "output=sweep")
    wait_for(lambda: all((folder / f"num_rounds=150+seed={i}" / "metrics.jsonl").is_file() for i in range(2)), sweep)
    cluster.stdin.write("\n")
    cluster.stdin.flush()
    out, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 1, err
    assert sorted(states(folder).values()) == ["failed", "finished", "finished", "finished"]
    [reason] = [row["reason"] for row in manifest(folder)["jobs"] if row["state"] == "failed"]
    assert reason.startswith("its process died (")
    assert json.loads(out.splitlines()[0]) == {"remark": "2 jobs side by side"}
    sweep = start(tmp_path, "run", "-m", "resume=sweep", *where)  # on the machine that is left
    _, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 0, err
    assert call("run", "-m", *grid, "output=whole")[0] == 0
    assert bits(folder) == bits(tmp_path / "whole")


def test_an_address_without_a_cluster_and_jobs_that_would_take_it_are_one_line(call: Call, quick: list[str]) -> None:
    for more, said in (
        ((), "error: no Ray cluster at sweep.address=127.0.0.1:1 ("),
        (("runtime=ray",), "error: sweep.address=127.0.0.1:1 with runtime=ray"),
        (("hydra/launcher=joblib",), "error: sweep.address=127.0.0.1:1 with hydra/launcher=joblib"),
    ):
        status, _, err = call("run", "-m", *quick, "seed=0,1", "sweep.address=127.0.0.1:1", *more)
        assert (status, first_line(err).startswith(said)) == (2, True), err
    assert not list(Path().glob("multirun/*/*/*"))
