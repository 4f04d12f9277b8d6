"""A cluster that is joined lives on, a run's own ends with it by any signal, and one that is not there or does not start is named."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedsb import cli
from fedsb.core.errors import UserError
from fedsb.models.build import forget_models
from fedsb.runtime.cluster import RAY_SWITCHES
from fedsb.runtime.pool import close_pools, pool_for, pools
from tests.runtime.pools import OBEYING, RAY, federate, ready
from tests.strategies.private_runs import small

pytestmark = RAY


def test_an_address_without_a_cluster_is_named() -> None:
    close_pools()
    with pytest.raises(UserError, match=r"^no Ray cluster at runtime.address=127.0.0.1:1 \(.*\); start one with 'ray start --head'"):
        pool_for(replace(OBEYING, address="127.0.0.1:1"))


def test_a_ray_that_does_not_start_is_one_line(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    close_pools()
    (tmp_path / "taken").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "taken" / "below"))
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["run", *small(tiny_bert, tmp_path), "runtime=ray", f"output={tmp_path / 'run'}"])
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the run stopped: Ray does not start on this machine: ")
    assert str(tmp_path / "taken") in said


class Cluster:
    """A cluster that is there before a run and after it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self.said()

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def cpus(self) -> tuple[float, float]:
        """Return how many it has and how many are free."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        whole, free = self.said().split()
        return float(whole), float(free)

    def cpus_within(self, seconds: float, wanted: tuple[float, float]) -> bool:
        """Wait until so many are free."""
        deadline = time.monotonic() + seconds
        while (found := self.cpus()) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return found == wanted


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a cluster in a process of its own, and end it with all of its processes."""
    close_pools()
    command, root = [sys.executable, "-m", "tests.runtime.cluster_head"], Path(__file__).resolve().parents[2]
    environment = {**os.environ, **RAY_SWITCHES}
    with subprocess.Popen(command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        made = Cluster(process)
        below = psutil.Process(process.pid).children(recursive=True)
        yield made
        process.communicate(timeout=60)  # the end of its input
    assert not psutil.wait_procs(below, timeout=30)[1]


def test_a_cluster_that_is_joined_gives_the_same_bits_and_lives_on(
    cluster: Cluster, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides, folder = small(tiny_bert, tmp_path, "init.kind=weight_svd"), tmp_path / "run"
    whole = federate(tmp_path / "whole", overrides)
    joined = ["runtime=ray", f"runtime.address={cluster.address}", "runtime.workers=2", "runtime.cpus=0.5", f"output={folder}"]
    forget_models()
    assert cli.run([*overrides, *joined]) == 0
    ready(pools()[0])
    assert cluster.cpus_within(30, (2.0, 1.0)), "two actors of half a CPU each"
    assert json.loads((folder / "summary.json").read_text())["factors_sha256"] == whole["factors_sha256"]
    close_pools()
    assert cluster.cpus_within(30, (2.0, 2.0))  # Ray ends the actors of a driver that has left when it notices


def heed_interrupts() -> None:
    """Undo what a shell does to commands in the background, whose children would ignore Ctrl-C, as a terminal's do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SIGNALS = {
    # Ctrl-C in a terminal reaches the whole group of processes; SIGTERM the one that it is sent to, where Ray has a handler of its own.
    "interrupted": (os.killpg, signal.SIGINT, 130),
    "ended by SIGTERM": (os.kill, signal.SIGTERM, 143),
}


def test_interrupted_it_leaves_a_checkpoint_and_no_process(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either signal, one after the other; and what is left goes on to the bits of a run left alone."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_rounds=40")
    whole, folder = federate(tmp_path / "whole", overrides), tmp_path / "run"
    ray_of_one = ["runtime=ray", "runtime.workers=1", "runtime.cpus=0.5", "progress=lines"]
    given = [*overrides, *ray_of_one, f"output={folder}", f"hydra.run.dir={folder}"]
    for how, (send, number, status) in SIGNALS.items():
        with subprocess.Popen(
            [sys.executable, "-m", "fedsb.cli", "run", *given],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if re.match("round +[1-9]", line))
            below = psutil.Process(process.pid).children(recursive=True)
            send(process.pid, number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == status
        assert said.splitlines()[-1] == f"{how}; go on with: fedsb run resume={folder}"
        assert "Traceback" not in said
        assert not (folder / "summary.json").exists()
        assert below
        assert not psutil.wait_procs(below, timeout=30)[1]
        given = [f"resume={folder}", "progress=lines"]
    # In this process: what a resumed run ends with hangs on its folder, whatever had computed until then.
    assert cli.run([f"resume={folder}", "runtime=local"]) == 0
    assert json.loads((folder / "summary.json").read_text())["factors_sha256"] == whole["factors_sha256"]
