"""A worker and whoever watches it: the worker says when it begins a message and when it is done; one that is late or dead is replaced."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fedsb.core.signals import Terminated

PULSE = "FEDSB_WORKER_PULSE"  # the file descriptor that a watched worker writes to
GRACE_S = 30.0  # beyond the operator's max_seconds, in which the worker ends a message by itself
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 15.0)  # before a worker that did not last is started again; relays wait longer
LASTING_S = 60.0
MISTAKE = 2  # the status of a command that could not begin: where it never has, to begin it again would not help
BEGUN = "begun"
STOP_S = 10.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Pulse:
    """Tells a supervisor, where there is one, that a message is under way and how long it may take."""

    def __init__(self) -> None:
        found = os.environ.get(PULSE)
        self._to = int(found) if found else None

    def begun(self) -> None:
        """Say that the worker answers from now on."""
        self._say(BEGUN)

    @contextmanager
    def over(self, seconds: float | None) -> Iterator[None]:
        """Say so before and behind the block."""
        self._say("0" if seconds is None else repr(seconds))
        try:
            yield
        finally:
            self._say("done")

    def _say(self, word: str) -> None:
        if self._to is not None:
            with suppress(OSError):
                os.write(self._to, f"{word}\n".encode())


def die_with_supervisor() -> None:
    """Let SIGTERM come when the supervisor is gone, however it went (Linux): an orphan would hold the folder against the next one."""
    if PULSE in os.environ:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(command: Sequence[str], say: Callable[[str], None]) -> int:
    """Keep a worker running until a signal ends this process, or the worker says that it can't begin; return the exit status.

    Args:
        command: that starts it.
        say: takes a line about each end of a worker.
    """
    tries, ever = 0, False
    while True:
        begun = time.monotonic()
        status, answered = _watched(command, say)
        ever |= answered
        if status == MISTAKE and not ever:
            return status
        tries = 0 if time.monotonic() - begun > LASTING_S else tries + 1
        pause = PAUSES_S[min(tries, len(PAUSES_S)) - 1] if tries else 0.0
        say(f"the worker ended with status {status}; it is started again{f' in {pause:g} s' if pause else ''}")
        time.sleep(pause)


def _watched(command: Sequence[str], say: Callable[[str], None]) -> tuple[int, bool]:
    listening, telling = os.pipe()
    try:
        environment = {**os.environ, PULSE: str(telling)}
        worker = subprocess.Popen(command, env=environment, pass_fds=(telling,))
    finally:
        os.close(telling)
    try:
        answered = _listen(listening, worker, say)
        return worker.wait(), answered
    except (KeyboardInterrupt, Terminated):
        _end(worker)
        raise
    finally:
        os.close(listening)


def _listen(listening: int, worker: subprocess.Popen[Any], say: Callable[[str], None]) -> bool:
    """Follow what a worker says until it is gone, and end it where a message is late; tell whether it ever answered."""
    deadline: float | None = None
    rest, answered = b"", False
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([listening], [], [], wait)
        if not ready:
            say("a message took longer than the operator allows and did not end; the worker is killed")
            worker.kill()
            deadline = None
            continue
        heard = os.read(listening, 4096)
        if not heard:
            return answered
        *words, rest = (rest + heard).split(b"\n")
        for word in words:
            answered |= word == BEGUN.encode()
            seconds = 0.0 if word in (b"done", BEGUN.encode()) else float(word)
            deadline = time.monotonic() + seconds + GRACE_S if seconds else None


def _end(worker: subprocess.Popen[Any]) -> None:
    worker.terminate()
    with suppress(subprocess.TimeoutExpired):
        worker.wait(STOP_S)
        return
    worker.kill()
    worker.wait()


def command_of(*arguments: str) -> list[str]:
    """Return the command that starts a worker with this interpreter."""
    return [sys.executable, "-P", "-m", "fedsb.cli", "worker", *arguments]  # -P: no code out of the working folder
