"""What has become of a sweep's jobs: a table, or one JSON object."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from fedsb.core.logs import speech
from fedsb.report.progress import Screen
from fedsb.report.table import number
from fedsb.sweep.endings import Ending, endings
from fedsb.sweep.jobs import Job
from fedsb.sweep.manifest import DONE, state_told
from fedsb.sweep.standing import metrics_of

COLUMNS = ("job", "varies", "state", "result", "why")


def tell(folder: Path, jobs: Sequence[Job], *, progress: str) -> None:
    """Print what became of each job, those that failed with reason and exit status, and how to go on where one is left."""
    ended = endings(folder)
    rows = [_row(job, ended.get(job.number), folder / job.name) for job in jobs]
    if speech(progress) == "json":
        print(json.dumps({"sweep": str(folder), "jobs": rows}), flush=True)
    else:
        _print(rows, folder)
    if any(row["state"] != DONE for row in rows):
        print(f"go on with: {shlex.join(['fedsb', 'run', '-m', f'resume={folder}'])}", file=sys.stderr)


def _row(job: Job, ending: Ending | None, folder: Path) -> dict[str, object]:
    finished = (folder / "summary.json").is_file()
    note = "" if ending is None else "finished before" if finished and ending.skipped else "" if finished else ending.reason
    return {
        "job": job.number,
        "folder": job.name,
        "varies": job.label,
        "state": state_told(folder, ending),
        "metrics": metrics_of(folder) if finished else {},
        "status": ending and ending.status,
        "note": note,
    }


def _print(rows: Sequence[Mapping[str, object]], folder: Path) -> None:
    console = Screen()
    table = Table(box=box.ROUNDED if console.is_terminal else box.ASCII)
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        metrics = row["metrics"] if isinstance(row["metrics"], dict) else {}
        result = "  ".join(f"{name} {number(float('nan') if value is None else value)}" for name, value in list(metrics.items())[:2])
        why = f"exit status {row['status']}: {row['note']}" if row["status"] else row["note"]
        table.add_row(*(Text(str(cell)) for cell in (row["job"], row["varies"], row["state"], result, why)))
    console.print(table)
    console.print(Text(f"sweep folder: {folder}"), soft_wrap=True)
