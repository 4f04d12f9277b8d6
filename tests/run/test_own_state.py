"""What a client keeps of its own: by round, whole, and no more rounds than a run may go back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsb.core.errors import RunError
from fedsb.core.state import Name, State, sha256
from fedsb.run.own_state import OwnState


def state(value: float) -> State:
    return State({Name("layer.0|odd name", "B"): torch.full((3, 2), value), Name("layer.1", "B"): torch.full((1,), -value)})


def test_a_round_begins_with_the_last_one_before_it(tmp_path: Path) -> None:
    own = OwnState(tmp_path / "client", keep=3)
    assert own.last(1) is None
    for number in (1, 2, 5):
        own.save(number, state(number))
    assert [sha256(found) for before in (2, 3, 5, 6) if (found := OwnState(tmp_path / "client", 3).last(before))] == [
        sha256(state(number)) for number in (1, 2, 2, 5)
    ]


def test_a_run_that_goes_back_forgets_what_came_later(tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=3)
    for number in (1, 2, 3):
        own.save(number, state(number))
    own.save(2, state(20))
    assert own.last(99) is not None
    assert sha256(own.last(99) or State()) == sha256(state(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0001.safetensors", "round-0002.safetensors"]


def test_no_more_rounds_are_kept_than_a_run_may_go_back(tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=2)
    for number in range(1, 8):
        own.save(number, state(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-000{number}.safetensors" for number in (5, 6, 7)]


def test_what_is_damaged_is_named_and_nothing_older_takes_its_place(tmp_path: Path) -> None:
    own = OwnState(tmp_path, keep=2)
    for number in (1, 2):
        own.save(number, state(number))
    (tmp_path / "round-0002.safetensors").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"what this client keeps of its own, '.*round-0002\.safetensors', cannot be read: "):
        own.last(3)
