"""Progress: bars on a terminal alone, lines or JSON, and a terminal given back whatever happens."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedsb.report.pace import Pace
from fedsb.report.progress import JsonProgress, Progress
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


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pace_of_a_run_of_three_rounds_of_four_clients() -> None:
    """Two seconds a client, two of evaluation: ten seconds a round."""
    clock = Clock()
    pace = Pace(3, examples=16, clock=clock)
    pace.begin(1, 4)
    assert pace.eta_s() is None
    assert pace.examples_per_s() is None
    for client in range(1, 5):
        clock.now += 2
        pace.reply()
        assert pace.examples_per_s() == 8
        assert pace.eta_s() == 2 * (4 - client) + 2 * 8
    clock.now += 2
    pace.end(10.0)
    pace.begin(2, 4)
    assert pace.eta_s() == 20
    clock.now += 2
    pace.reply()
    assert pace.eta_s() == 18


def test_memory_is_that_of_this_process_at_least() -> None:
    held = np.ones(30 * 2**20, np.uint8)
    assert Pace(1).memory_bytes() > held.nbytes


def test_a_terminal_tells_speed_end_and_memory() -> None:
    out = io.StringIO()
    with Progress(2, Console(file=out, force_terminal=True, width=120), examples=5) as progress:
        progress.begin(1, ["a", "b"])
        progress.reply("a", True)
    assert re.search(r"1/2 .*examples/s  run ends in .* [kMG]B", out.getvalue())


def test_json_is_one_object_a_line() -> None:
    out = io.StringIO()
    with JsonProgress(3, Console(file=out), examples=5) as progress:
        progress.say("a remark")
        for record in make_records():
            progress.begin(record.round, list(record.clients))
            for client in record.clients:
                progress.reply(client, client not in record.failed)
            progress.end(record)
        progress.finish({"accuracy": 1.0}, Path("run"))
    remark, *rounds, end = map(json.loads, out.getvalue().splitlines())
    assert remark == {"remark": "a remark"}
    assert [row["round"] for row in rounds] == [record.round for record in make_records()]
    assert [row["metrics"] for row in rounds] == [record.metrics for record in make_records()]
    assert all(row["rounds"] == 3 and row["memory_bytes"] > 0 and row["wall_s"] > 0 for row in rounds)
    assert rounds[-1]["eta_s"] == 0
    assert rounds[-1]["examples_per_s"] > 0
    assert end == {"summary": {"accuracy": 1.0}, "folder": "run"}


@pytest.mark.slow
def test_each_line_leaves_at_once() -> None:
    """A pipe is block-buffered: without a flush the line would wait for the process's end, which ``os._exit`` skips."""
    code = "import os; from fedsb.report.progress import Progress; Progress(1).say('round [1/1] :smile:'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "round [1/1] :smile:\n"
