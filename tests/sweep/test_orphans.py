"""Jobs that a launcher has left behind: who is waited for, and who is dead."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path

import pytest

from fedsb.sweep import orphans
from fedsb.sweep.endings import Ending, endings, note
from fedsb.sweep.jobs import Job
from fedsb.sweep.orphans import at_work, await_left, forget_work


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay the folder of a sweep with two jobs that have said that they begin."""
    monkeypatch.setattr(orphans, "LOOK_S", 0.02)
    monkeypatch.setattr(orphans, "QUIET_S", 0.1)
    (tmp_path / "manifest.json").write_text(json.dumps({"jobs": [{"number": number, "state": "running"} for number in range(2)]}))
    return tmp_path


def jobs() -> list[Job]:
    return [Job(number, (), f"j{number}", f"j{number}") for number in range(2)]


def test_a_job_whose_model_is_still_loaded_is_waited_for_and_one_without_a_process_is_dead(sweep: Path) -> None:
    """Neither has a folder yet."""
    with ThreadPoolExecutor(1) as pool:
        with at_work(sweep, 0):
            waiting = pool.submit(await_left, sweep, jobs(), {}, "gone")
            with pytest.raises(NotYet):
                waiting.result(timeout=0.6)
            note(sweep, Ending(0, "j0", 0))
        waiting.result(timeout=30)
    assert {number: (each.status, each.reason) for number, each in endings(sweep).items()} == {
        0: (0, ""),
        1: (1, "its process died (gone)"),
    }
    forget_work(sweep)
    assert sorted(path.name for path in sweep.iterdir()) == ["jobs.jsonl", "manifest.json"]
