"""What is seen while a run is under way: a bar for the round's replies on a terminal, plain lines, or lines of JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fedsb.report.counting import Count, counted
from fedsb.report.pace import Pace
from fedsb.report.table import human_bytes, human_seconds, print_summary, round_line
from fedsb.run.records import RoundRecord


class Screen(Console):
    """Standard output, of which rich is not to say that nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        """Let the command line end it, in place of rich."""
        raise BrokenPipeError


class Progress:
    """Shows the rounds of a run. Leave it through ``with`` or :meth:`close`, so that a failed run gives the terminal back.

    Args:
        num_rounds: how many rounds the run has.
        console: where to write; None takes standard output.
        examples: that a client trains on in a round, on average; None where nobody knows.
    """

    def __init__(self, num_rounds: int, console: Console | None = None, examples: float | None = None) -> None:
        self.num_rounds = num_rounds
        self.pace = Pace(num_rounds, examples)
        self._console = console or Screen()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._failed = 0
        self._last_failed = ""
        self._count = Count(self._console, self._counted)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def begin(self, round: int, clients: Sequence[str]) -> None:
        """Start a round that asks ``clients``."""
        self.close()
        self.pace.begin(round, len(clients))
        self._failed, self._last_failed = 0, ""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            # Lines of the log go above the bar, but not out of a file that standard error was sent to.
            shared = sys.stderr is not None and sys.stderr.isatty()
            self._bar = Bar(*columns, TimeElapsedColumn(), console=self._console, transient=True, redirect_stderr=shared)
            self._task = self._bar.add_task(f"round {round}/{self.num_rounds}", total=len(clients), note=self._note())
            self._bar.start()

    def reply(self, client: str, ok: bool) -> None:
        """Count a reply in; ``ok`` is False for a failure."""
        self.pace.reply()
        if not ok:
            self._failed, self._last_failed = self._failed + 1, client
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=self._note())

    def _note(self) -> str:
        rate, eta = self.pace.examples_per_s(), self.pace.eta_s()
        parts = [
            f"{rate:,.0f} examples/s" if rate is not None else "",
            f"run ends in {human_seconds(eta)}" if eta else "",  # what is left at 0 is the last evaluation, of unknown length
            human_bytes(self.pace.memory_bytes()),
            f"{self._failed} failed, last {self._last_failed}" if self._failed else "",
        ]
        return "  ".join(filter(None, parts))

    def count(self, what: str, done: int, total: int) -> None:
        """Show how far the server's evaluation is, where it takes long."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._count(what, done, total)

    def _counted(self, what: str, done: int, total: int, left: float | None) -> None:
        self.say(f"evaluating: {counted(what, done, total, left)}")

    def end(self, record: RoundRecord) -> None:
        """Finish a round with its line."""
        self.close()
        if record.wall_s is not None:
            self.pace.end(record.wall_s)
        self.show(record)

    def show(self, record: RoundRecord) -> None:
        """Print a round."""
        self.say(round_line(record, self.num_rounds))

    def say(self, line: str) -> None:
        """Print one line, unbroken, and hand it on at once."""
        self._console.print(Text(line), soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        """Take the bar away; harmless where there is none."""
        self._count.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finish(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Print what a run came to."""
        print_summary(summary, folder, self._console)


class JsonProgress(Progress):
    """One JSON object a line and nothing else: rounds as they end, remarks, and the summary."""

    def __init__(self, num_rounds: int, console: Console | None = None, examples: float | None = None) -> None:
        super().__init__(num_rounds, console, examples)
        self._rate: float | None = None

    def begin(self, round: int, clients: Sequence[str]) -> None:
        """Start a round, in silence."""
        self.pace.begin(round, len(clients))
        self._rate = None

    def reply(self, client: str, ok: bool) -> None:
        """Count a reply in."""
        self.pace.reply()
        # Up to the last reply: what follows is evaluation.
        self._rate = self.pace.examples_per_s()

    def show(self, record: RoundRecord) -> None:
        """Print a round: what ``metrics.jsonl`` has is there; this is for who watches."""
        self._write(
            {
                "round": record.round,
                "rounds": self.num_rounds,
                "clients": len(record.clients),
                "failed": len(record.failed),
                "metrics": dict(record.metrics),
                # A run that leaves out its rounds' times must not say them otherwise.
                "examples_per_s": None if record.wall_s is None else self._rate,
                "wall_s": record.wall_s,
                "eta_s": None if record.wall_s is None else self.pace.eta_s(),
                "memory_bytes": self.pace.memory_bytes(),
            }
        )

    def say(self, line: str) -> None:
        """Print a remark."""
        self._write({"remark": line})

    def _counted(self, what: str, done: int, total: int, left: float | None) -> None:
        self._write({"evaluating": what, "done": done, "of": total, "eta_s": left})

    def finish(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Print the summary."""
        self._write({"summary": dict(summary), "folder": str(folder)})

    def _write(self, row: Mapping[str, Any]) -> None:
        print(json.dumps(_finite(row), allow_nan=False), file=self._console.file, flush=True)


def _finite(value: Any) -> Any:
    """Return a value as JSON has it: None for what is no finite number."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


PROGRESS: dict[str, type[Progress]] = {"lines": Progress, "json": JsonProgress}
