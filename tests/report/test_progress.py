"""Progress: bars on a terminal, nothing but lines in a pipe, and a terminal given back whatever happens."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from fedsb.report.progress import Progress
from fedsb.report.table import round_line
from tests.report.made import make_records

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def play(*, terminal: bool) -> str:
    """Show three rounds of ten clients and return what was written."""
    out = io.StringIO()
    with Progress(3, Console(file=out, force_terminal=terminal, width=70)) as progress:
        for record in make_records():
            progress.begin(record.round, list(record.clients))
            for client in record.clients:
                progress.reply(client, client not in record.failed)
            progress.end(record)
    return out.getvalue()


def test_a_pipe_gets_one_unbroken_line_a_round() -> None:
    assert play(terminal=False).splitlines() == [round_line(record, 3) for record in make_records()]


def test_a_terminal_gets_bars_and_the_same_lines() -> None:
    text = play(terminal=True)
    assert text.count(HIDE) == text.count(SHOW) == 4
    assert all(round_line(record, 3) in text for record in make_records())


def lose(progress: Progress) -> None:
    """Fail in the middle of a round."""
    with progress:
        progress.begin(1, ["a", "b"])
        progress.reply("a", False)
        raise RuntimeError("lost")


def test_a_failed_run_gives_the_terminal_back() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError, match="lost"):
        lose(Progress(1, Console(file=out, force_terminal=True)))
    assert "1 failed, last a" in out.getvalue()
    assert out.getvalue().count(HIDE) == out.getvalue().count(SHOW) == 1


@pytest.mark.slow
def test_each_line_leaves_at_once() -> None:
    """A pipe is block-buffered: without a flush the line would wait for the process's end, which ``os._exit`` skips."""
    code = "import os; from fedsb.report.progress import Progress; Progress(1).say('round [1/1] :smile:'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "round [1/1] :smile:\n"
