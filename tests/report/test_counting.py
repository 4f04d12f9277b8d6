"""Long measurements: silent while they are short, a bar or lines apart when they are not, one count after the other."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from fedsb.core.counting import count, counted_by
from fedsb.report.counting import APART, PATIENCE, Count
from fedsb.report.progress import JsonProgress, Progress


class Clock:
    """Goes on by ``step`` seconds whenever it is looked at."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def shown(step: float, *, terminal: bool = False, total: int = 20) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=90, color_system=None)
    with Count(console, clock=Clock(step)) as counter, counted_by(counter.beginning("untouched base")):
        for done in range(total + 1):
            count("responses", done, total)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_short_is_not_shown(*, terminal: bool) -> None:
    assert shown(PATIENCE / 100, terminal=terminal) == ""


def test_lines_are_apart_and_say_whose_how_many_and_how_long() -> None:
    lines = shown(APART / 4).splitlines()
    assert 3 <= len(lines) <= 20 / 4 * 2
    assert all(line.startswith("untouched base: ") and " of 20 responses, about " in line and line.endswith(" left") for line in lines)


def test_a_terminal_has_a_bar_that_is_taken_away() -> None:
    text = shown(PATIENCE, terminal=True)
    assert "untouched base: responses" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_nothing_done_promises_no_end_and_a_second_count_of_the_same_begins_anew() -> None:
    out, clock = io.StringIO(), Clock(0)
    counter = Count(Console(file=out, width=90), clock=clock)
    for done in (0, 0, 10, 20, 0, 5):
        counter("examples", done, 20)
        clock.now += APART
    assert out.getvalue().splitlines() == [
        "0 of 20 examples",
        "10 of 20 examples, about 1 min 0 s left",
        "5 of 20 examples, about 1 min 30 s left",
    ]


def test_nobody_is_told_outside_of_a_block_nor_of_one_within_for_others() -> None:
    told: list[Any] = []
    with counted_by(lambda *each: told.append(each)):
        with counted_by(None):
            count("examples", 1, 2)
        count("examples", 2, 2)
    count("examples", 1, 2)
    assert told == [("examples", 2, 2)]


def test_a_run_says_how_far_an_evaluation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsb.report.counting.APART", 0.0)
    lines, rows = io.StringIO(), io.StringIO()
    for progress in (Progress(2, Console(file=lines, width=90)), JsonProgress(2, Console(file=rows))):
        with progress:
            progress.count("responses", 0, 300)
            progress.count("responses", 150, 300)
            progress.count("responses", 300, 300)
    assert lines.getvalue().splitlines()[1].startswith("evaluating: 150 of 300 responses, about 0.0 s")
    found = [json.loads(line) for line in rows.getvalue().splitlines()]
    assert [row["done"] for row in found] == [0, 150]
    assert found[0] == {"evaluating": "responses", "done": 0, "of": 300, "eta_s": None}
