"""A worker that dies, hangs, or cannot begin, as its supervisor sees it: real processes that do no more than that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedsb.resident import watch
from fedsb.resident.watch import PULSE, Pulse, supervise
from tests.flower.harness import eventually


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "GRACE_S", 0.2)
    monkeypatch.setattr(watch, "PAUSES_S", (0.0, 0.01))


def script(folder: Path, *lives: str) -> list[str]:
    """Return the command of a worker that lives each of these lives in turn, and after them cannot begin."""
    count = folder / "lives"
    body = "\n".join(
        [
            "import os, sys, time",
            f"path = {str(count)!r}",
            "life = len(open(path).read()) if os.path.exists(path) else 0",
            "open(path, 'a').write('x')",
            f"say = lambda word: os.write(int(os.environ[{PULSE!r}]), (word + chr(10)).encode())",
            f"lives = {list(lives)!r}",
            "exec(lives[life]) if life < len(lives) else sys.exit(2)",
        ]
    )
    return [sys.executable, "-c", body]


LIVES: dict[str, tuple[str, str]] = {
    "killed": ("os.kill(os.getpid(), 9)", "ended with status -9"),
    "failed": ("sys.exit(1)", "ended with status 1"),
    "late": ("say('0.05'); time.sleep(60)", "took longer than the operator allows"),
    "late again": ("say('0.05'); say('done'); say('0.05'); time.sleep(60)", "took longer than the operator allows"),
    "late behind others in one breath": ("say('9' + chr(10) + 'done' + chr(10) + '0.05'); time.sleep(60)", "took longer"),
}


@pytest.mark.parametrize("case", LIVES)
def test_a_worker_that_ends_is_started_again(case: str, tmp_path: Path) -> None:
    life, line = LIVES[case]
    said: list[str] = []
    assert supervise(script(tmp_path, life), said.append) == 2
    assert line in said[0]
    assert "it is started again" in said[-1]
    assert (tmp_path / "lives").read_text() == "xx"


def test_what_passes_does_not_end_it_once_the_worker_has_answered(tmp_path: Path) -> None:
    """A file that is being saved, or data that are being replaced, when the worker is started again."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line.partition(";")[0])
        if len(said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(script(tmp_path, "say('begun'); sys.exit(1)"), say)
    assert said == ["the worker ended with status 1", *["the worker ended with status 2"] * 3]


def test_a_message_without_a_limit_or_that_is_done_is_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    lives = ("say('0'); time.sleep(0.6); sys.exit(7)", "say('0.05'); say('done'); time.sleep(0.6); sys.exit(8)")
    assert supervise(script(tmp_path, *lives), said.append) == 2
    assert [line.partition(";")[0] for line in said] == ["the worker ended with status 7", "the worker ended with status 8"]


def test_a_signal_ends_both(tmp_path: Path) -> None:
    """Started by a process that heeds signals as a command does."""
    body = "\n".join(
        [
            "import sys",
            "from fedsb.core.signals import Terminated, heeding_sigterm",
            "from fedsb.resident.watch import supervise",
            f"command = {script(tmp_path, 'time.sleep(600)')!r}",
            "with heeding_sigterm():",
            "    try:",
            "        supervise(command, print)",
            "    except Terminated:",
            "        sys.exit(143)",
        ]
    )
    with subprocess.Popen([sys.executable, "-c", body], cwd=Path(__file__).parents[2]) as supervisor:
        assert eventually(lambda: bool(psutil.Process(supervisor.pid).children()) and (tmp_path / "lives").exists(), 20)
        [child] = psutil.Process(supervisor.pid).children()
        supervisor.send_signal(signal.SIGTERM)
        assert supervisor.wait(20) == 143
    assert not child.is_running()


def test_a_worker_does_not_outlive_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    up = tmp_path / "up"
    life = f"from fedsb.resident.watch import die_with_supervisor; die_with_supervisor(); open({str(up)!r}, 'w'); time.sleep(600)"
    body = f"from fedsb.resident.watch import supervise; supervise({script(tmp_path, life)!r}, print)"
    with subprocess.Popen([sys.executable, "-c", body], cwd=Path(__file__).parents[2]) as supervisor:
        assert eventually(up.exists, 20)
        [child] = psutil.Process(supervisor.pid).children()
        supervisor.kill()
        supervisor.wait(20)
    assert eventually(lambda: not child.is_running(), 20)


def test_a_worker_that_nobody_watches_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PULSE, raising=False)
    with Pulse().over(3.0):
        pass
    here, there = os.pipe()
    monkeypatch.setenv(PULSE, str(there))
    with Pulse().over(None):
        assert os.read(here, 99) == b"0\n"
    assert os.read(here, 99) == b"done\n"
    os.close(here)
    with Pulse().over(1.5):  # the supervisor is gone: the message goes on
        pass
    os.close(there)


def test_who_waits_is_woken_by_the_end_of_the_worker_and_not_by_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = threading.Thread(target=supervise, args=(script(tmp_path, "say('600'); sys.exit(0)"), lambda line: None))
    done.start()
    done.join(20)
    assert not done.is_alive()
    assert time.monotonic() - begun < 15
