"""A job of a sweep in whatever process: begun or gone on with, and how it ended noted in the sweep's folder."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import fedsb.commands.run as runs
from fedsb.app.anchoring import anchored
from fedsb.app.assembly import peopled
from fedsb.commands.outcome import DONE, FAILED, MISTAKE, ended_line, status_of
from fedsb.config.compose import load
from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import say_early, speaking_to
from fedsb.core.signals import how_ended
from fedsb.sweep.endings import Ending, note
from fedsb.sweep.jobs import Job
from fedsb.sweep.manifest import read
from fedsb.sweep.standing import CUT, FINISHED, NEW

TOLD = {NEW: "", CUT: ", which goes on", FINISHED: ", which had finished"}


def line_of(job: Job, of: int, state: str) -> str:
    """Return the line that names a job, one of so many, by what stands in its folder."""
    return f"job {job.number + 1} of {of}: {job.label}{TOLD[state]}"


def status_of_job(sweep: str, more: Sequence[str], number: int) -> int:
    """Run a job as :func:`run_numbered` does, and return its exit status."""
    return run_numbered(Path(sweep), number, more).status


def run_numbered(sweep: Path, number: int, more: Sequence[str] = ()) -> Ending:
    """Run a job of a sweep, or go on with it.

    Args:
        sweep: its folder.
        number: of the job.
        more: overrides beside the job's own.
    """
    manifest = read(sweep)
    job, folder = manifest.jobs[number], sweep / manifest.jobs[number].name
    state = CUT if (folder / "config.yaml").is_file() else NEW
    overrides = [*job.overrides, *more, *([f"resume='{folder.absolute()}'"] if state == CUT else [])]

    def go() -> None:
        given = load(overrides)
        say_early(line_of(job, len(manifest.jobs), state), progress=given.progress)
        runs.run_job(peopled(anchored(given, Path(manifest.place))), overrides, folder)

    with speaking_to(people=runs.to_people()):
        return run_noted(sweep, job, go)


def run_noted(folder: Path, job: Job, run: Callable[[], object]) -> Ending:
    """Run a job, and note in the sweep's folder how it ended.

    A job that fails is told of on standard error and does not end the sweep; one that is interrupted does.
    """
    begun = time.monotonic()
    status, reason = _outcome(run)
    ending = Ending(job.number, job.label, status, reason, wall_s=time.monotonic() - begun)
    note(folder, ending)
    return ending


def _outcome(run: Callable[[], object]) -> tuple[int, str]:
    try:
        run()
    except UserError as error:
        return _told(MISTAKE, f"error: {error}", str(error))
    except RunError as error:
        return _told(FAILED, f"error: the run stopped: {error}", str(error))
    except KeyboardInterrupt as error:
        return _told(status_of(error), ended_line(error), how_ended(error))
    except BrokenPipeError:  # nobody reads of this job or the next
        raise
    except Exception as error:  # a fault of ours: the other jobs go on
        return _told(FAILED, traceback.format_exc(), f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return DONE, ""


def _told(status: int, line: str, reason: str) -> tuple[int, str]:
    print(line, file=sys.stderr)
    return status, reason
