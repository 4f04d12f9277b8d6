"""Jobs that go on where the launcher that began them has given up, as submitit's does when one of them dies."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedsb.run.folder import is_held
from fedsb.sweep.endings import Ending, endings, note
from fedsb.sweep.jobs import Job
from fedsb.sweep.manifest import MANIFEST, RUNNING

LOOK_S = 1.0
# In which nobody was seen at a run, as while its model is loaded: what is not begun by then waits in a queue, or never will be.
QUIET_S = 600.0
DIED = 1


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
        held = {job.number for job in left if is_held(folder / job.name)}
        were_held |= held
        quiet_since = time.monotonic() if held else quiet_since
        if not held and (were_held >= {job.number for job in left} or time.monotonic() - quiet_since > QUIET_S):
            break
        time.sleep(LOOK_S)
    begun = has_begun(folder)
    for job in left:
        if job.number in were_held | begun:
            note(folder, Ending(job.number, job.label, DIED, f"its process died ({reason})"))


def _left(folder: Path, jobs: Sequence[Job], before: Mapping[int, Ending]) -> list[Job]:
    """Return the jobs that have neither finished nor ended otherwise since they were handed over."""
    now = endings(folder)
    return [job for job in jobs if not (folder / job.name / "summary.json").is_file() and now.get(job.number) == before.get(job.number)]


def has_begun(folder: Path) -> set[int]:
    """Return the numbers of the jobs that have said that they begin, and not that they have ended."""
    return {row["number"] for row in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["jobs"] if row["state"] == RUNNING}
