"""``fedsb watch``: how a run or a sweep stands, until it is over or whoever looks has seen enough."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedsb.commands.flags import with_values
from fedsb.core.disk import replace_whole
from fedsb.core.errors import UserError
from fedsb.report.comparing import comparisons
from fedsb.report.comparison import PAGE
from fedsb.report.folders import RUN_PAGE
from fedsb.report.methods import Asked
from fedsb.report.page.page import page_text
from fedsb.report.progress import Screen
from fedsb.run.folder import Run, read_run
from fedsb.sweep.watching import Seen, Watch, board, cells, counts_text, is_over

EVERY_S = 2.0
LEAST_S = 0.1
PAGE_EVERY_S = 15.0  # a page of many runs takes seconds of the processor that they share
ROOM = 6  # lines of a terminal that are no rows


def watch(arguments: Sequence[str]) -> int:
    """Show it, and with ``--html`` keep its page fresh.

    Raises:
        UserError: no folder, one that holds nothing to look at, or a flag that nobody knows or that does not fit.
    """
    folders, flags = with_values("watch", arguments)
    if len(folders) != 1:
        raise UserError("fedsb watch needs the folder of one run or sweep: fedsb watch outputs/…")
    every = _seconds(flags.get("--every"))
    found = Watch(Path(folders[0]))
    fresh = Fresh(found) if "--html" in flags else None
    console = Screen()
    with _shown(console) as live:
        before: dict[str, tuple[str, ...]] = {}
        while True:
            seen = found.look()
            over = is_over(seen) or "--once" in flags
            if live is not None:
                live.update(board(found.folder, seen, None if over else max(1, console.height - ROOM)), refresh=True)
            else:
                before = _say(console, seen, before)
            if fresh is not None:
                fresh.keep(now=over)
            if over:
                break
            time.sleep(every)
    if live is None:
        console.print(Text(counts_text(seen)), soft_wrap=True)
    return 0


def _seconds(text: str | None) -> float:
    try:
        value = EVERY_S if text is None else float(text)
    except ValueError:
        value = math.nan
    if not LEAST_S <= value < math.inf:
        raise UserError(f"--every {text}: give seconds, {LEAST_S:g} at least")
    return value


@contextmanager
def _shown(console: Console) -> Iterator[Live | None]:
    """Give what draws on a terminal; None where output goes elsewhere, which gets a line for each change."""
    if not console.is_terminal:
        yield None
        return
    with Live(console=console, auto_refresh=False) as live:
        yield live


def _say(console: Console, seen: Sequence[Seen], before: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Print a line for each run that stands otherwise than before, and return how they stand."""
    # The last column is a clock, which changes at every look.
    now = {each.label: cells(each)[:-1] for each in seen}
    for label, row in now.items():
        if before.get(label) != row:
            console.print(Text("  ".join(row)), soft_wrap=True)
    console.file.flush()
    return now


class Fresh:
    """Keeps the page of what is looked at fresh."""

    def __init__(self, found: Watch) -> None:
        self._found, self._at = found, -math.inf
        self._made: tuple[tuple[Path, int, bool], ...] = ()

    def keep(self, *, now: bool) -> None:
        """Write the page where there are new records, at once or after a while."""
        if not now and time.monotonic() - self._at < PAGE_EVERY_S:
            return
        runs = [run for path in self._found.runs() if (run := _readable(path)) is not None]
        marks = tuple((run.path, len(run.records), run.summary is None) for run in runs)
        if runs and marks != self._made:
            name = RUN_PAGE if self._found.is_run else PAGE
            replace_whole(self._found.folder / name, page_text(comparisons(runs, Asked()), self._found.folder))
            self._made = marks
        self._at = time.monotonic()


def _readable(path: Path) -> Run | None:
    """Return a run; None of one that has no record yet, or is damaged: the board says so."""
    try:
        return read_run(path)
    except (UserError, ValueError, KeyError, TypeError, AttributeError):
        return None
