"""What stands in a job's folder, and what is done about one that is damaged: set aside whole, or refused where a ledger counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.run.resuming import sealed
from fedsb.sweep.endings import Ending
from fedsb.sweep.manifest import state_told
from fedsb.sweep.standing import CUT, NEW, DamagedJobError, set_aside, state_of

PRIVATE = ("privacy=example", "privacy.epsilon=3")


def laid(folder: Path, *overrides: str) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(sealed(load(list(overrides))), encoding="utf-8")
    return folder


def test_nothing_yet_or_a_run_that_was_cut_off(tmp_path: Path) -> None:
    assert state_of(tmp_path / "none", load([])) == NEW
    (tmp_path / "empty").mkdir()
    assert state_of(tmp_path / "empty", load([])) == NEW
    folder = laid(tmp_path / "run")
    assert state_of(folder, load([])) == CUT
    (folder / "metrics.jsonl").write_text('{"round": 0}\n{"rou')  # killed while it wrote
    assert state_of(folder, load([])) == CUT
    with pytest.raises(UserError, match=r"holds a job of another sweep \(train\.lr=.* there, 0\.5 here\)"):
        state_of(folder, load(["train.lr=0.5"]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", "{}\n"),
        ("metrics.jsonl", "\0\0\0\n"),
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("summary.json", '{"rounds": 3}'),
        ("config.yaml", ""),
        ("config.yaml", "seed: 1\n"),
    ],
)
def test_what_a_run_does_not_leave_is_damage_and_is_kept(tmp_path: Path, name: str, text: str) -> None:
    folder = laid(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(DamagedJobError) as damage:
        state_of(folder, load([]))
    assert str(damage.value)
    for number in (1, 2):
        said = set_aside(folder, load([]), damage.value)
        assert said.startswith(f"'{folder}' is damaged (")
        assert said.endswith(f"it is set aside as 'run.damaged-{number}', and the job runs again")
        assert (tmp_path / f"run.damaged-{number}" / name).read_text() == text
        assert state_of(folder, load([])) == NEW
        laid(folder)
        (folder / name).write_text(text)


def test_what_a_ledger_was_charged_for_is_not_run_again_unasked(tmp_path: Path) -> None:
    folder = laid(tmp_path / "run", *PRIVATE)
    (folder / "summary.json").write_text("{")
    with pytest.raises(DamagedJobError) as damage:
        state_of(folder, load(list(PRIVATE)))
    with pytest.raises(UserError, match="and its ledger counts: restore it, or move it away"):
        set_aside(folder, load(list(PRIVATE)), damage.value)
    assert (folder / "summary.json").read_text() == "{"


def test_the_state_of_a_job_is_what_stands_there_and_how_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert state_told(folder, None) == "waiting"
    assert state_told(folder, Ending(0, "", 2, "a mistake")) == "failed"
    laid(folder)
    assert state_told(folder, None) == "interrupted"  # killed, and could say nothing
    assert state_told(folder, Ending(0, "", 143)) == state_told(folder, Ending(0, "", 130)) == "interrupted"
    assert state_told(folder, Ending(0, "", 137)) == "failed"
    (folder / "summary.json").write_text("{}")
    assert state_told(folder, Ending(0, "", 1)) == "finished"
