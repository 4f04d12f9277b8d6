"""Checkpoints: what is written comes back, whichever round it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedsb.core.errors import RunError, UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State, sha256
from fedsb.run import log_files
from fedsb.run.checkpoint import Carried, Snapshot, load_checkpoint, save_checkpoint
from fedsb.wire.frozen import FrozenLog


def state(seed: int, *roles: str) -> State:
    names = [Name(module, role) for module in ("encoder.0.query", "encoder.1|odd") for role in roles]
    return State({name: torch.randn(3, 2, generator=torch_generator(seed, "test", *name)) for name in names})


def test_state_and_frozen_log_come_back_bit_for_bit(tmp_path: Path) -> None:
    log = FrozenLog()
    for number in range(12):
        if number:
            delta = state(number, "U")
            log.append(delta.merge(State({Name(n.module, "V"): t.T.contiguous() for n, t in delta.items()})))
        trained = state(100 + number, "A", "B", HEAD)
        carried = Carried({"moments": state(number, "R.exp_avg")}, {"clip": 0.1 * number})
        save_checkpoint(tmp_path / "checkpoints", Snapshot(number, trained, log, carried))
        snapshot = load_checkpoint(tmp_path / "checkpoints")
        found, again, frozen = snapshot.round, snapshot.state, snapshot.frozen
        assert sha256(snapshot.carried.states["moments"]) == sha256(carried.states["moments"])
        assert snapshot.carried.facts == carried.facts
        assert found == number
        assert sha256(again) == sha256(trained)
        assert list(again) == list(trained)
        assert frozen.heads == log.heads
        assert frozen.view().residuals.keys() == log.view().residuals.keys()
        assert all(torch.equal(t.matrix(), log.view().residuals[module].matrix()) for module, t in frozen.view().residuals.items())


def test_a_large_delta_lies_in_its_file_and_leads_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "REST_BYTES", 1)
    resting, held = FrozenLog(), FrozenLog()
    for number in range(1, 5):
        draw = torch_generator(number, "test")
        delta = State({Name("x", "U"): torch.randn(20, 2, generator=draw), Name("x", "V"): torch.randn(2, 20, generator=draw)})
        for log in (resting, held):
            log.append(delta)
        save_checkpoint(tmp_path, Snapshot(number, State(), resting))
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in tmp_path.glob("frozen-*"))
    for since in (0, 2, 3):
        mine, theirs = (log.bundle(since) for log in (resting, held))
        assert mine is not None
        assert theirs is not None
        assert (mine.parent, mine.head, list(mine.state)) == (theirs.parent, theirs.head, list(theirs.state))
        assert all(map(torch.equal, mine.state.values(), theirs.state.values()))
    assert sha256(*resting.deltas().values()) == sha256(*held.deltas().values())


def test_one_round_is_kept_and_each_delta_is_written_once(tmp_path: Path) -> None:
    log = FrozenLog()
    log.append(state(0, "A", "B"))
    save_checkpoint(tmp_path, Snapshot(1, state(1, "R"), log))
    [delta] = tmp_path.glob("frozen-0001-*.safetensors")
    first = delta.stat().st_mtime_ns
    log.append(state(2, "A"))
    save_checkpoint(tmp_path, Snapshot(2, state(3, "R"), log))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"frozen-0001-{log.heads[1][:8]}.safetensors",
        f"frozen-0002-{log.heads[2][:8]}.safetensors",
        "round-0002.safetensors",
    ]
    assert delta.stat().st_mtime_ns == first


def test_a_delta_of_a_round_that_did_not_finish_is_left_out(tmp_path: Path) -> None:
    log = FrozenLog()
    log.append(state(0, "A", "B"))
    save_checkpoint(tmp_path, Snapshot(1, state(1, "R"), log))
    finished = log.head
    log.append(state(2, "A"))
    elsewhere = tmp_path / "elsewhere"
    save_checkpoint(elsewhere, Snapshot(2, state(3, "R"), log))
    [unfinished] = elsewhere.glob("frozen-0002-*")
    unfinished.rename(tmp_path / unfinished.name)
    assert load_checkpoint(tmp_path).frozen.head == finished
    next(tmp_path.glob("frozen-0001-*")).unlink()
    with pytest.raises(RunError, match=r"no checkpoint can be used: .*round-0001.safetensors' can't be read \(frozen-0001-"):
        load_checkpoint(tmp_path)


def test_transposed_tensors_are_written_too(tmp_path: Path) -> None:
    transposed = State({Name("x", "A"): torch.arange(6.0).reshape(2, 3).T})
    log = FrozenLog()
    log.append(transposed)
    save_checkpoint(tmp_path, Snapshot(1, transposed, log))
    snapshot = load_checkpoint(tmp_path)
    again, frozen = snapshot.state, snapshot.frozen
    assert torch.equal(again[Name("x", "A")], transposed[Name("x", "A")])
    assert frozen.head == log.head


def test_an_empty_folder_holds_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_checkpoint(tmp_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_damaged_delta_is_written_again(tmp_path: Path) -> None:
    """Round 3's delta is damaged and round 3 runs again, to the same head: the file's name alone must not pass for its content."""
    log = FrozenLog()
    for number in (1, 2, 3):
        log.append(state(number, "A"))
        save_checkpoint(tmp_path, Snapshot(number, state(10 + number, "R"), log), keep=2)
    flip(next(tmp_path.glob("frozen-0003-*")))
    again = load_checkpoint(tmp_path)
    assert again.round == 2
    again.frozen.append(state(3, "A"))
    for number in (3, 4):
        save_checkpoint(tmp_path, Snapshot(number, state(10 + number, "R"), again.frozen), keep=2)
    assert again.frozen.head == log.head
    found = load_checkpoint(tmp_path)
    assert (found.round, found.frozen.head) == (4, log.head)


def test_a_delta_that_another_process_left_is_read_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, read = FrozenLog(), []
    log.append(state(1, "A"))
    save_checkpoint(tmp_path, Snapshot(1, state(2, "R"), log))
    monkeypatch.setattr(log_files, "_WHOLE", {})
    monkeypatch.setattr(log_files, "read_whole", lambda path, real=log_files.read_whole: (read.append(path.name), real(path))[1])
    for number in (2, 3):
        save_checkpoint(tmp_path, Snapshot(number, state(2, "R"), log))
    assert read == [f"frozen-0001-{log.head[:8]}.safetensors"]
    monkeypatch.setattr(log_files, "_WHOLE", {})
    load_checkpoint(tmp_path)
    read.clear()
    save_checkpoint(tmp_path, Snapshot(4, state(2, "R"), log))
    assert read == []


def test_files_of_other_names_and_numbers_do_not_take_a_rounds_place(tmp_path: Path) -> None:
    (tmp_path / "round-x.safetensors").write_bytes(b"")
    (tmp_path / "round-0009-copy.safetensors").write_bytes(b"")
    (tmp_path / "round-9999.safetensors").write_bytes(b"")
    for number in (1, 2):
        save_checkpoint(tmp_path, Snapshot(number, state(number, "R"), FrozenLog()))
        assert load_checkpoint(tmp_path).round == number
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "round-0002.safetensors",
        "round-0009-copy.safetensors",
        "round-9999.safetensors",
        "round-x.safetensors",
    ]


def test_a_later_format_is_named_though_it_hashes_otherwise(tmp_path: Path) -> None:
    facts = json.dumps({"format": 99, "of": "another shape"})
    save_file({"anything": torch.zeros(1)}, tmp_path / "round-0001.safetensors", metadata={"facts": facts, "blake3": "0" * 64})
    with pytest.raises(UserError, match=r"written by a later version \(format 99, this one reads 3\); use that version$"):
        load_checkpoint(tmp_path)
