"""What is seen of a sweep: how many are done, what runs, and when all will be over."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from fedsb.sweep.board import Board
from fedsb.sweep.jobs import label_jobs

JOBS = label_jobs([[f"seed={i}"] for i in range(6)])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def records(folder: Path, number: int, lines: int) -> None:
    place = folder / JOBS[number].name
    place.mkdir(exist_ok=True)
    (place / "metrics.jsonl").write_text("{}\n" * lines + '{"tor')


def board(folder: Path, progress: str = "lines", *, terminal: bool = False) -> tuple[Board, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    return Board(folder, JOBS, dict.fromkeys(range(1, 6), 4), 2, progress=progress, console=console), out


def test_the_end_is_foretold_by_the_jobs_so_far_or_by_the_rounds_of_the_first(tmp_path: Path, clock: list[float]) -> None:
    """Job 0 had finished before; the other five take 40 s each, two at a time."""
    seen, out = board(tmp_path)
    with seen:
        seen.begun(1)
        seen.begun(2)
        assert seen.eta_s() is None
        clock[0] += 20.0
        records(tmp_path, 1, 3)  # the start, and two rounds of four
        records(tmp_path, 2, 3)
        assert seen.eta_s() == pytest.approx((5 - 1) * 40 / 2)
        clock[0] += 20.0
        seen.ended(1, 0)
        seen.ended(2, 137)
        seen.begun(3)
        assert seen.eta_s() == pytest.approx(3 * 40 / 2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "2 jobs side by side"
    assert lines[1].startswith("job 2 of 6: seed=1: finished in 40 s; 2 of 6 done, 1 running, 3 waiting, all in ")
    assert lines[2] == "job 3 of 6: seed=2: failed with status 137 in 40 s; 3 of 6 done (1 failed), 0 running, 3 waiting, all in 1 min 0 s"


def test_a_terminal_has_a_table_that_lives(tmp_path: Path, clock: list[float]) -> None:
    seen, out = board(tmp_path, terminal=True)
    records(tmp_path, 1, 2)
    with seen:
        seen.begun(1)
        seen.begun(4)
        clock[0] += 10.0
        seen.look()
    shown = out.getvalue()
    assert "1/4" in shown
    assert "seed=4" in shown
    assert "1 of 6 done, 2 running, 3 waiting, all in" in shown


def test_programs_get_lines_of_json(tmp_path: Path, clock: list[float]) -> None:
    seen, out = board(tmp_path, "json")
    with seen:
        seen.begun(1)
        clock[0] += 2.0
        seen.ended(1, 0)
    first, begun, ended = map(json.loads, out.getvalue().splitlines())
    assert first == {"remark": "2 jobs side by side"}
    assert (begun["job"], begun["running"], ended["job"], ended["done"], ended["eta_s"]) == (1, 1, 1, 1, 4.0)
