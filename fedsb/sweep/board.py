"""What is seen of a sweep whose jobs run side by side: a table that lives on a terminal, plain lines, or lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedsb.core.logs import speech
from fedsb.report.progress import Screen
from fedsb.report.table import human_seconds
from fedsb.sweep.jobs import Job

HEAD = ("job", "varies", "round", "since")


class Board:
    """Counts jobs, and shows those that run. Leave it through ``with``.

    Args:
        folder: of the sweep.
        jobs: all of them.
        rounds: that each job which is to run has, by number.
        size: how many run side by side.
        progress: as configured.
        console: where to write; None takes standard output.
    """

    def __init__(
        self, folder: Path, jobs: Sequence[Job], rounds: Mapping[int, int], size: int, *, progress: str, console: Console | None = None
    ) -> None:
        self._folder, self._jobs, self._rounds, self._size = folder, jobs, rounds, size
        self._json = speech(progress) == "json"
        self._console = console or Screen()
        self._running: dict[int, float] = {}
        self._took: list[float] = []
        self._failed: list[int] = []
        self._live: Live | None = None

    def __enter__(self) -> Board:
        if self._console.is_terminal and not self._json:
            self._live = Live(self._table(), console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._say(f"{self._size} jobs side by side", "remark")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begun(self, number: int) -> None:
        """Take in that a job has begun."""
        self._running[number] = time.monotonic()
        if self._json:
            self._say("begun", "job", number)
        self.look()

    def ended(self, number: int, status: int) -> None:
        """Take in that a job has ended."""
        wall_s = time.monotonic() - self._running.pop(number)
        self._took.append(wall_s)
        if status:
            self._failed.append(number)
        how = f"failed with status {status}" if status else "finished"
        job = self._jobs[number]
        self._say(f"job {number + 1} of {len(self._jobs)}: {job.label}: {how} in {human_seconds(wall_s)}; {self._counts()}", "job", number)
        self.look()

    def look(self) -> None:
        """Show how it stands now."""
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def eta_s(self) -> float | None:
        """Return the seconds until all have ended: by the jobs so far, or by the rounds of those that run; None before the first."""
        parts = {number: self._part(number) for number in self._running}
        now = time.monotonic()
        guessed = [(now - self._running[number]) / part for number, part in parts.items() if part > 0]
        took = self._took or guessed
        if not took:
            return None
        left = len(self._rounds) - len(self._took) - sum(parts.values())
        return max(0.0, left) * sum(took) / len(took) / self._size

    def _part(self, number: int) -> float:
        """Return how much of a job's rounds there are records of."""
        return min(1.0, self._round(number) / max(1, self._rounds[number]))

    def _round(self, number: int) -> int:
        """Return a job's last round by its records: the first one is of the state before the first round."""
        try:
            return max(0, (self._folder / self._jobs[number].name / "metrics.jsonl").read_bytes().count(b"\n") - 1)
        except OSError:
            return 0

    def _counts(self) -> str:
        done, eta = len(self._took), self.eta_s()
        waiting = len(self._rounds) - done - len(self._running)
        before = len(self._jobs) - len(self._rounds)
        failed = f" ({len(self._failed)} failed)" if self._failed else ""
        ends = f", all in {human_seconds(eta)}" if eta else ""
        return f"{before + done} of {len(self._jobs)} done{failed}, {len(self._running)} running, {waiting} waiting{ends}"

    def _table(self) -> Group:
        table = Table(*HEAD, box=None, header_style="dim")
        for number, begun in self._running.items():
            cells = (f"{number + 1}", self._jobs[number].label, f"{self._round(number)}/{self._rounds[number]}")
            table.add_row(*map(Text, cells), human_seconds(time.monotonic() - begun))
        return Group(table, Text(self._counts()))

    def _say(self, line: str, key: str, number: int | None = None) -> None:
        if not self._json:
            self._console.print(Text(line), soft_wrap=True)
            return
        counts = {"done": len(self._took), "failed": len(self._failed), "running": len(self._running), "eta_s": self.eta_s()}
        row = {"remark": line} if number is None else {key: number, "varies": self._jobs[number].label, "said": line, **counts}
        print(json.dumps(row), file=self._console.file, flush=True)
