"""How the jobs of a sweep have ended: ``jobs.jsonl`` has a line whenever one does, from whatever process; the last one of a job counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fedsb.core.disk import append_line, cut_torn, locked

JOBS = "jobs.jsonl"
BY_SIGNAL = (130, 143)  # Ctrl-C and SIGTERM, which end the sweep too; any other that ends a job alone is a failure of that job


@dataclass(frozen=True)
class Ending:
    """How a job ended: its exit status, why it failed, and whether it was found finished."""

    job: int
    label: str
    status: int
    reason: str = ""
    skipped: bool = False
    wall_s: float = 0.0

    @property
    def by_signal(self) -> bool:
        """Whether somebody has ended it."""
        return self.status in BY_SIGNAL


def note(folder: Path, ending: Ending) -> None:
    """Note how a job ended, in the sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / JOBS) as file:
        cut_torn(file)
        append_line(file, asdict(ending))


def endings(folder: Path) -> Mapping[int, Ending]:
    """Return how each job ended last, by its number; a line that is damaged tells of none, as the jobs' own folders say how they stand."""
    path = folder / JOBS
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = [_ending(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {ending.job: ending for ending in found if ending is not None}


def _ending(line: str) -> Ending | None:
    known = {each.name for each in fields(Ending)}
    try:
        found = Ending(**{key: value for key, value in json.loads(line).items() if key in known})
    except (ValueError, TypeError, AttributeError):
        return None
    return found if type(found.job) is type(found.status) is int else None
