"""A sweep: the jobs of one grid in one folder. What has finished is skipped, what was cut off goes on, and a table tells of each.

``jobs.jsonl`` in the sweep's folder has a line whenever a job ends, from whatever process it ran in; the last one of a job counts.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsb.commands.outcome import DONE, FAILED, MISTAKE, by_signal, ended_line, status_of
from fedsb.config.schema import Config
from fedsb.core.disk import cut_torn, locked
from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import say_early, speech
from fedsb.core.signals import how_ended
from fedsb.run.resuming import differences, unsealed

JOBS = "jobs.jsonl"
NEW, CUT, FINISHED = "new", "cut", "finished"


@dataclass(frozen=True)
class Job:
    """One point of the grid: its overrides, and what of them varies over the sweep."""

    number: int
    overrides: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Ending:
    """How a job ended: its exit status, why it failed, and whether it was found finished."""

    job: int
    label: str
    status: int
    reason: str = ""
    skipped: bool = False
    wall_s: float = 0.0


def label_jobs(jobs: Sequence[Sequence[str]]) -> tuple[Job, ...]:
    """Name each job by the overrides that are not the same in all."""
    varied = [place for place, values in enumerate(zip(*jobs, strict=True)) if len(set(values)) > 1]
    return tuple(Job(i, tuple(job), " ".join(job[place] for place in varied) or "the only job") for i, job in enumerate(jobs))


def state_of(folder: Path, config: Config) -> str:
    """Return what stands in a job's folder: nothing yet, a run that was cut off, or one that has finished.

    Args:
        folder: of the job.
        config: of the job, its paths absolute and its clients named.

    Raises:
        UserError: it holds a run of another configuration.
    """
    if not (folder / "config.yaml").is_file():
        return NEW
    if differ := differences(config, unsealed(folder / "config.yaml")):
        shown = ", ".join(f"{key}={there} there, {here} here" for key, (here, there) in list(differ.items())[:3])
        raise UserError(f"'{folder}' holds a job of another sweep ({shown}); choose another output=…")
    return FINISHED if (folder / "summary.json").is_file() else CUT


def going_on(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return a job's overrides with which it goes on in its folder."""
    kept = [text for text in overrides if not text.startswith(("output=", "resume="))]
    return [*kept, f"resume='{folder}'"]


def run_noted(folder: Path, job: Job, of: int, state: str, run: Callable[[], object], *, progress: str) -> Ending:
    """Run a job, or leave it where it has finished, and note in the sweep's folder how it ended.

    A job that fails is told of on standard error and does not end the sweep; one that is interrupted does.
    """
    told = {NEW: "", CUT: ", which goes on", FINISHED: ", which had finished"}[state]
    say_early(f"job {job.number + 1} of {of}: {job.label}{told}", progress=progress)
    begun = time.monotonic()
    status, reason = (DONE, "") if state == FINISHED else _outcome(run)
    ending = Ending(job.number, job.label, status, reason, state == FINISHED, time.monotonic() - begun)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / JOBS) as file:
        cut_torn(file)
        file.write(json.dumps(asdict(ending)).encode() + b"\n")
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


def endings(folder: Path) -> dict[int, Ending]:
    """Return how each job ended last."""
    path = folder / JOBS
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {row["job"]: Ending(**row) for row in rows}


def tell(folder: Path, jobs: Sequence[Job], arguments: Sequence[str], *, progress: str) -> None:
    """Print what became of each job, and how to go on where one is left: a table, or one JSON object."""
    ended = endings(folder)
    rows = [_row(job, ended.get(job.number), folder / str(job.number)) for job in jobs]
    if speech(progress) == "json":
        print(json.dumps({"sweep": str(folder), "jobs": rows}), flush=True)
    else:
        _print(rows, folder)
    if any(row["state"] != "finished" for row in rows):
        again = [argument for argument in arguments if not argument.startswith("output=")]
        print(f"go on with: {shlex.join(['fedsb', 'run', *again, f'output={folder}'])}", file=sys.stderr)


def _row(job: Job, ending: Ending | None, folder: Path) -> dict[str, object]:
    finished = (folder / "summary.json").is_file()
    state = "finished" if finished else "not run" if ending is None else "interrupted" if by_signal(ending.status) else "failed"
    metrics = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["metrics"] if finished else {}
    note = ending.reason if ending and not finished else "finished before" if ending and ending.skipped else ""
    return {"job": job.number, "varies": job.label, "state": state, "metrics": metrics, "status": ending and ending.status, "note": note}


def _print(rows: Sequence[dict[str, object]], folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedsb.report.table import number

    console = Console()
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII)
    for name in ("job", "varies", "state", "result", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        metrics = row["metrics"] if isinstance(row["metrics"], dict) else {}
        result = "  ".join(f"{name} {number(float('nan') if value is None else value)}" for name, value in list(metrics.items())[:2])
        table.add_row(*(Text(str(cell)) for cell in (row["job"], row["varies"], row["state"], result, row["note"])))
    console.print(table)
    console.print(Text(f"sweep folder: {folder}"), soft_wrap=True)
