"""What a client keeps of its own: by round, whole, and as much as a run may go back to."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.state import Name, State, sha256
from fedsb.privacy.codes import OwnStateLost
from fedsb.run.own_state import OwnState, forget_old
from fedsb.wire.cache_limits import DAY


def state(value: float) -> State:
    return State({Name("layer.0|odd name", "B"): torch.full((3, 2), value), Name("layer.1", "B"): torch.full((1,), -value)})


# Of each round: whether the client trains, whether its upload counts, and how many checkpoints back the run is resumed after it (0: not).
EVENTS = st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([0, 0, 0, 1, 2, 3])), min_size=1, max_size=25)


@given(EVENTS, st.integers(1, 3))
def test_every_checkpoint_that_is_kept_finds_the_state_that_had_counted_by_then(events: list[tuple[bool, bool, int]], keep: int) -> None:
    """Against a server that is two lists: the number and the value of the last state that counted, by checkpoint."""
    with TemporaryDirectory() as folder:
        own, checkpoints, value = OwnState(Path(folder) / "client", keep), [(0, 0, 0.0)], 0.0
        for trains, counts, back in events:
            number, counted, held = checkpoints[-1]
            if trains:
                assert not counted or sha256(own.of(counted)) == sha256(state(held))
                value += 1
                own.save(number + 1, state(value), since=counted)
            checkpoints = [*checkpoints, (number + 1, *((number + 1, value) if trains and counts else (counted, held)))][-keep:]
            if 0 < back < len(checkpoints):
                checkpoints = checkpoints[:-back]
            assert all(sha256(own.of(counted)) == sha256(state(held)) for _, counted, held in checkpoints if counted)
            ahead = 2  # rounds that a run which went back has behind it for nothing
            assert len(list(Path(folder).rglob("*.safetensors"))) <= keep + 1 + ahead


def test_no_more_is_kept_than_a_run_may_go_back_to(tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=2)
    for number in range(1, 8):
        own.save(number, state(number), since=number - 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-000{number}.safetensors" for number in (5, 6, 7)]


def test_uploads_that_never_count_do_not_push_out_the_last_that_did(tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=2)
    own.save(1, state(1), since=0)
    for number in range(2, 9):
        own.save(number, state(number), since=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0001.safetensors", "round-0008.safetensors"]


def test_what_came_late_pushes_out_nothing_that_counted(tmp_path: Path) -> None:
    """Round 2's upload comes when round 3 is over; a damaged checkpoint 3 leads back to 2, by which round 1 had counted."""
    own = OwnState(tmp_path, keep=2)
    for number, since in ((1, 0), (3, 1), (2, 1), (4, 3)):
        own.save(number, state(number), since=since)
    assert sha256(own.of(1)) == sha256(state(1))
    own.save(5, state(5), since=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-000{number}.safetensors" for number in (3, 4, 5)]


@pytest.mark.parametrize("content", [b"torn", None], ids=["damaged", "gone"])
def test_what_is_not_there_is_named_and_nothing_takes_its_place(content: bytes | None, tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=2)
    for number in (1, 2):
        own.save(number, state(number), since=number - 1)
    path = tmp_path / "round-0002.safetensors"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(OwnStateLost, match=r"kept of its own in round 2, '.*round-0002\.safetensors', cannot be read: "):
        own.of(2)
    assert sha256(own.of(1)) == sha256(state(1))


def test_runs_that_have_not_used_what_they_kept_for_long_lose_it_and_no_others(tmp_path: Path) -> None:
    """Reading is use; the run that is under way keeps all, whatever the times of its files say."""
    for run in ("old", "read", "fresh", "this"):
        OwnState(tmp_path / run / "client", 1).save(1, State({Name("m", "B"): torch.ones(2)}), since=0)
        for path in (*(tmp_path / run).rglob("*"), tmp_path / run):
            os.utime(path, (DAY, DAY))
    OwnState(tmp_path / "read" / "client", 1).of(1)
    OwnState(tmp_path / "fresh" / "client", 1).save(2, State({Name("m", "B"): torch.ones(2)}), since=1)
    assert forget_old(tmp_path, 30, "this", now=30 * DAY) == []
    assert forget_old(tmp_path, 30, "this") == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "read", "this"]
    assert forget_old(tmp_path / "nothing", 30, "this") == []
