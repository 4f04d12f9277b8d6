"""Jobs that go on where the launcher that began them has given up, as submitit's does when one of them dies."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedsb.sweep.endings import Ending, endings, note
from fedsb.sweep.jobs import Job
from fedsb.sweep.manifest import MANIFEST, RUNNING

LOOK_S = 1.0
QUIET_S = 60.0  # in which nobody was at work: what is not begun by then waits in a queue, or never will be
AT_WORK = "at_work"  # folder of a sweep: a file a job, locked from before it says that it begins until it has said how it ended
DIED = 1


@contextmanager
def at_work(folder: Path, number: int) -> Iterator[None]:
    """Show those who wait for a job that its process is there, however long its model takes to load; the lock ends with the process."""
    (folder / AT_WORK).mkdir(exist_ok=True)
    with (folder / AT_WORK / str(number)).open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_work(folder: Path) -> None:
    """Remove what shows who is at work, where nobody is any more."""
    shutil.rmtree(folder / AT_WORK, ignore_errors=True)


def _is_at_work(folder: Path, number: int) -> bool:
    try:
        with (folder / AT_WORK / str(number)).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def await_left(folder: Path, jobs: Sequence[Job], before: Mapping[int, Ending], reason: str) -> None:
    """Wait for those jobs that processes are at, and note of those that have died why.

    Args:
        folder: of the sweep.
        jobs: that were handed to the launcher.
        before: how they had ended when they were.
        reason: what the launcher said.
    """
    were_held: set[int] = set()
    quiet_since = time.monotonic()
    while left := _left(folder, jobs, before):
        held = {job.number for job in left if _is_at_work(folder, job.number)}
        were_held |= held
        quiet_since = time.monotonic() if held else quiet_since
        gone = were_held | has_begun(folder) >= {job.number for job in left}
        if not held and (gone or time.monotonic() - quiet_since > QUIET_S):
            break
        time.sleep(LOOK_S)
    begun = has_begun(folder)
    for job in _left(folder, jobs, before):  # anew: one may have ended since
        if job.number in were_held | begun:
            note(folder, Ending(job.number, job.label, DIED, f"its process died ({reason})"))


def _left(folder: Path, jobs: Sequence[Job], before: Mapping[int, Ending]) -> list[Job]:
    """Return the jobs that have neither finished nor ended otherwise since they were handed over."""
    now = endings(folder)
    return [job for job in jobs if not (folder / job.name / "summary.json").is_file() and now.get(job.number) == before.get(job.number)]


def has_begun(folder: Path) -> set[int]:
    """Return the numbers of the jobs that have said that they begin, and not that they have ended."""
    return {row["number"] for row in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["jobs"] if row["state"] == RUNNING}
