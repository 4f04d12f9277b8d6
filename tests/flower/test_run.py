"""``flwr run`` for real: the documented command, what it must survive, and what it must leave behind (nothing)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fedsb.cli import run
from fedsb.runtime.connection import flower_environment, script
from fedsb.runtime.flower import free_port
from tests.flower.conftest import local
from tests.flower.harness import ROOT, belonging_to, command, copy_checkout, eventually, submitting, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
SWITCH = "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"


class Shell:
    """A user's shell: ``flwr`` with its own daemon and nothing set but where that keeps its state."""

    def __init__(self, home: Path) -> None:
        self.home = home
        environment = flower_environment(home)
        # An empty cache and no network: whatever Flower wanted to install could not be had.
        environment |= {"UV_OFFLINE": "1", "UV_CACHE_DIR": str(home / "uv"), "FEDSB_HOME": str(home / "fedsb"), "HF_HUB_OFFLINE": "1"}
        environment |= {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
        self.environment = {key: value for key, value in environment.items() if key != SWITCH}

    def flwr(self, *arguments: str, folder: Path) -> str:
        command = [script("flwr"), *arguments]
        done = subprocess.run(command, cwd=folder, env=self.environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, folder: Path, output: Path, overrides: list[str], *options: str) -> str:
        """Run, to the end where ``options`` hold ``--stream``, and return what Flower prints."""
        value = " ".join([*overrides, f"output={output}"])
        return self.flwr("run", ".", *options, "--run-config", f'overrides="{value}"', folder=folder)

    def statuses(self, folder: Path) -> list[str]:
        """Return how the runs stand, the latest first."""
        runs = json.loads(self.flwr("list", "--format", "json", folder=folder))["runs"]
        return [run["status"].removeprefix("finished:") for run in runs]

    def simulation(self) -> psutil.Process:
        """Return the process of the one run in progress."""
        [found] = [process for process in belonging_to(self.home) if "flwr-simulation" in " ".join(process.cmdline())]
        return found


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    home = tmp_path / "flwr"
    home.mkdir()
    yield Shell(home)
    for process in belonging_to(home):
        if "flower-superlink" in " ".join(process.cmdline()):
            process.terminate()
    assert eventually(lambda: not belonging_to(home))


STAGE = "import sys; from pathlib import Path; from fedsb.runtime.staging import stage_app; stage_app(Path(sys.argv[1]))"


def lay_trap(folder: Path) -> None:
    """Make the project's packages in a folder fail at import."""
    for package in ("fedsb", "strategies", "clients"):
        shutil.rmtree(folder / package)
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise SystemError('this is not what was submitted')\n")


def test_plain_flwr_run_survives_a_kill_and_runs_what_was_submitted(shell, python, overrides, expected, private, privately, tmp_path):
    """The last one privately: with the noise, the bits and the epsilon of a run in one process."""
    checkout = copy_checkout(tmp_path / "work" / "fedsb")
    log = shell.submit(checkout, tmp_path / "first", overrides, "--stream")
    assert "No additional application dependencies needed installation" in log
    assert summary(tmp_path / "first")["factors_sha256"] == expected
    # The SuperLink of the first run lives on in its folder. A second run dies there, and leaves Ray's processes to themselves.
    more = [*overrides, "federation.num_rounds=1000", f"output={tmp_path / 'killed'}"]
    with submitting("local", more, environment=shell.environment, folder=tmp_path / "watched") as (watched, _):
        assert eventually(lambda: (tmp_path / "killed" / "metrics.jsonl").is_file(), 120)
        watched.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background of a shell
        _, err = watched.communicate()
    assert watched.returncode == 143
    assert re.fullmatch(r"ended by SIGTERM; run (\d+) goes on: 'flwr log \1 local' shows it, 'flwr stop \1 local' ends it\n", err)
    shell.simulation().kill()
    # The next one comes from elsewhere, out of the installed wheel; relative paths still mean the daemon's folder.
    lay_trap(checkout)
    command(str(python), "-c", STAGE, str(tmp_path / "app"))
    three = ("--stream", "--federation-config", "num-supernodes=3")
    shell.submit(tmp_path / "app" / "fedsb", Path("relative"), private, *three)
    found = summary(checkout / "relative")
    assert (found["factors_sha256"], found["epsilon"]) == (privately["factors_sha256"], privately["epsilon"])
    assert 7.6 <= found["epsilon"]["max"] <= 8
    # Flower takes most of a minute of silence before it calls the killed one failed.
    assert eventually(lambda: shell.statuses(checkout) == ["completed", "failed", "completed"], 120, pause=10.0)


@pytest.fixture
def demo(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    def start(*overrides: str) -> subprocess.Popen[str]:
        environment = os.environ | {"FEDSB_HOME": str(tmp_path / "fedsb"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(ROOT / "scripts" / "demo.py"), *overrides]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    return start


def test_the_demo_ends_with_the_status_of_the_run(demo, overrides):
    with demo(*overrides, "rank=0") as process:
        out, _ = process.communicate()
    assert process.returncode == 1
    assert "error: rank" in out


def test_a_run_goes_on_after_a_kill_and_after_a_signal_to_the_bits_of_one_left_alone(demo, overrides, tmp_path):
    """A terminated demo takes everything with it, and prints our lines only; the last stretch goes on without Flower."""
    more = [*overrides, "init.kind=weight_svd", "federation.num_rounds=60"]
    folder, below = tmp_path / "run", list[psutil.Process]()

    def rounds() -> int:
        metrics = folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) - 1 if metrics.is_file() else -1

    with demo(*more, f"output={folder}") as process:
        assert eventually(lambda: rounds() > 1, 120, pause=0.05)
        killed = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in killed:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    assert not psutil.wait_procs(killed, timeout=10)[1]
    done = rounds()
    with demo(f"resume={folder}") as process:
        assert eventually(lambda: rounds() > done, 120, pause=0.05)
        below += psutil.Process(process.pid).children(recursive=True)
        assert any(each.name().startswith("ray::") for each in below)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate()
    assert process.returncode == 130
    assert not psutil.wait_procs(below, timeout=10)[1]
    assert re.search(r"^resumed .*round [1-9]", out, re.MULTILINE), out
    assert not re.search(r"INFO|WARNING|ClientAppActor|SuperLink", out)
    assert not (folder / "summary.json").exists()
    assert run([f"resume={folder}"]) == 0
    assert summary(folder)["factors_sha256"] == local(more, tmp_path / "whole")["factors_sha256"]
