"""What is seen while a run is under way: a bar for the round's replies on a terminal, plain lines in a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from fedsb.report.records import RoundRecord
from fedsb.report.table import round_line


class Progress:
    """Shows the rounds of a run. Leave it through ``with`` or :meth:`close`, so that a failed run gives the terminal back.

    Args:
        num_rounds: how many rounds the run has.
        console: where to write; None takes standard output.
    """

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        self.num_rounds = num_rounds
        self._console = console or Console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._failed = 0
        self._note = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def begin(self, round: int, clients: Sequence[str]) -> None:
        """Start a round that asks ``clients``."""
        self.close()
        self._failed = 0
        self._note = ""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Bar(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task(f"round {round}/{self.num_rounds}", total=len(clients), note="")
            self._bar.start()

    def reply(self, client: str, ok: bool) -> None:
        """Count a reply in; ``ok`` is False for a failure."""
        if not ok:
            self._failed += 1
            self._note = f"{self._failed} failed, last {client}"
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=self._note)

    def end(self, record: RoundRecord) -> None:
        """Finish a round with its line."""
        self.close()
        self.say(round_line(record, self.num_rounds))

    def say(self, line: str) -> None:
        """Print one line, unbroken, and hand it on at once."""
        self._console.print(Text(line), soft_wrap=True)
        self._console.file.flush()

    def close(self) -> None:
        """Take the bar away; harmless where there is none."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
