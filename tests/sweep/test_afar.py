"""Where a job may run on another machine, and how many of them a cluster takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.report.summary import versions
from fedsb.sweep import afar
from fedsb.sweep.afar import Needs, RayCrew, _serve
from fedsb.sweep.crew import Task
from fedsb.sweep.manifest import MANIFEST, Manifest, code_hash, write


def test_a_machine_that_cannot_have_the_same_bits_runs_nothing(tmp_path: Path) -> None:
    def run(number: int) -> int:
        raise AssertionError(number)

    task = Task(run, {0: tmp_path / "sweep" / "printed" / "job.txt"}, tmp_path, {})
    status, said = _serve(task, 0)
    assert status == 2
    assert f"does not see '{tmp_path / 'sweep'}': the machines of a cluster share the sweep's folder" in said
    (tmp_path / "sweep").mkdir()
    for code, known, why in (
        ("0" * 64, versions(), "has other sources of fedsb than"),
        (code_hash(), {**versions(), "torch": "1.0"}, f"has another torch ({versions()['torch']}) than"),
    ):
        write(tmp_path / "sweep", Manifest(str(tmp_path), code, known, {}, (), ()))
        status, said = _serve(task, 0)
        assert (status, why in said) == (2, True)
    (tmp_path / "sweep" / MANIFEST).write_text("[")
    status, said = _serve(task, 0)
    assert (status, "manifest.json" in said) == (2, True)


def test_a_cluster_is_handed_where_models_come_from_and_nothing_else() -> None:
    task = Task(int, {}, Path(), {"HF_HOME": "/models", "AWS_SECRET_ACCESS_KEY": "much"})
    assert RayCrew(1, task, Needs(1, 1))._task.environment == {"HF_HOME": "/models"}


def test_a_cluster_takes_as_many_jobs_as_its_machines_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each machine for itself: two halves make no room."""
    machines = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 5e9}},
        {"Alive": True, "Resources": {"CPU": 3.0, "memory": 64e9, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "memory": 64e9, "GPU": 8.0}},
    ]
    monkeypatch.setattr(afar.ray, "nodes", lambda: machines)
    assert Needs(2, 2 * 10**9).fit() == 2 + 1
    assert Needs(2, 2 * 10**9, 1).fit() == 1
    assert Needs(4, 10**10).fit() == 0
