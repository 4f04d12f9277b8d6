"""Long measurements as they go on: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fedsb.report.table import human_seconds

PATIENCE = 2.0  # seconds in which nothing is shown: most measurements are over by then
APART = 30.0  # seconds between two lines


Line = Callable[[str, int, int, float | None], None]


def counted(what: str, done: int, total: int, left: float | None) -> str:
    """Return a count as a line: ``32 of 300 responses, about 4 min 10 s left``."""
    return f"{done:,} of {total:,} {what}" + ("" if left is None else f", about {human_seconds(left)} left")


class Count:
    """Shows what is counted, one thing after the other. Leave it through ``with`` or :meth:`close`.

    Args:
        console: where to write.
        line: writes, where there is no terminal, what is counted, how many are done, of how many, and the seconds that are left, None where
            nothing is done yet; None writes text.
        clock: seconds.
    """

    def __init__(self, console: Console, line: Line | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._head = ""
        self._console, self._line, self._clock = console, line or self._print, clock
        self._now: tuple[str, int] | None = None
        self._last = 0
        self._began = self._said = 0.0
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Count:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def beginning(self, whose: str) -> Count:
        """Say whose counts come from now on, and return the one who is to be told."""
        self.close()
        self._head = f"{whose}: "
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` are done."""
        if self._now != (what, total) or done < self._last:
            self.close()
            self._now, self._began = (what, total), self._clock()
            self._said = self._began
        self._last = done
        if self._console.is_terminal:
            self._advance(what, done, total)
        elif self._clock() - self._said >= APART and done < total:
            self._said = self._clock()
            self._line(what, done, total, (self._said - self._began) / done * (total - done) if done else None)

    def close(self) -> None:
        """Take the bar away; harmless where there is none."""
        self._now = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _advance(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            if self._clock() - self._began < PATIENCE:
                return
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(f"{self._head}{what}", total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done)

    def _print(self, what: str, done: int, total: int, left: float | None) -> None:
        self._console.print(Text(self._head + counted(what, done, total, left)), soft_wrap=True)
        self._console.file.flush()
