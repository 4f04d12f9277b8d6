"""A folder from which one process runs at a time: it holds a lock while it does, and its id stands in the locked file."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from fedsb.core.disk import private_files
from fedsb.core.errors import UserError
from fedsb.runtime.connection import FlowerError
from fedsb.runtime.processes import lives

PID = "pid"
PATIENCE_S = 120.0  # for SuperLink, SuperNode and worker to end in order, or else
LOOK_S = 0.1


def running(folder: Path) -> psutil.Process | None:
    """Return the process that runs from a folder.

    Raises:
        FlowerError: another user's does, and its id can't be read.
    """
    try:
        with open(folder / PID, encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        with suppress(psutil.NoSuchProcess, ValueError):
            return psutil.Process(int((folder / PID).read_text(encoding="ascii")))
        return None
    except FileNotFoundError:
        return None
    except PermissionError:
        raise FlowerError(f"'{folder}' is another user's") from None


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Run from a folder for the length of a block; what is made meanwhile is nobody else's to read.

    Raises:
        UserError: another process runs from it.
    """
    with private_files(), open(folder / PID, "a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = running(folder)
            who = "another process" if other is None else f"process {other.pid}"
            raise UserError(f"{who} runs from '{folder}' already; 'fedsb federation stop {folder}' ends it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def stop(folder: Path, patience: float = PATIENCE_S) -> int:
    """End what runs from a folder, and return its process id.

    Raises:
        UserError: nothing does.
        FlowerError: it is another user's, or does not end in time.
    """
    process = running(folder)
    if process is None:
        raise UserError(f"nothing runs from '{folder}'")
    try:
        process.terminate()
    except psutil.NoSuchProcess:
        return int(process.pid)
    except psutil.AccessDenied:
        raise FlowerError(f"process {process.pid} of '{folder}' is another user's") from None
    deadline = time.monotonic() + patience
    while lives(process):  # psutil's own waiting lasts until the parent has asked how it ended, which may be long
        if time.monotonic() > deadline:
            raise FlowerError(f"process {process.pid} of '{folder}' has not ended in {patience:.0f} s")
        time.sleep(LOOK_S)
    return int(process.pid)
