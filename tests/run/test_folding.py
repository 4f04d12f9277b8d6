"""The frozen log on disk holds a sum in place of what nobody is sent any more, and no bundle, no bit and no resumed run tells."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.errors import RunError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.run import checkpoint, log_files
from fedsb.run.checkpoint import Snapshot, load_checkpoint, save_checkpoint
from fedsb.run.groups import tensors_of
from fedsb.run.whole_files import read_whole, write_whole
from fedsb.wire.frozen import FrozenLog

SHAPES = {"wide": (6, 12), "tall": (12, 6), "square": (9, 9), "low": (10, 10)}  # the matrix outweighs up to rank 4, 4, 4 and 5
LOW = 2  # what is added to "low" has no more rank than this, all together
RANKS = st.fixed_dictionaries({module: st.integers(0, 3) for module in SHAPES})
HISTORIES = st.lists(st.tuples(RANKS, st.booleans()), min_size=1, max_size=7)


def delta_of(ranks: dict[str, int], number: int, *, factors: bool = False) -> State:
    """Return what a round adds: pairs of some ranks, and factors that take the place of earlier ones."""
    draw = torch_generator(number, "folding")
    tensors: dict[Name, torch.Tensor] = {}
    basis = torch.randn(10, LOW, generator=torch_generator(0, "low")), torch.randn(LOW, 10, generator=torch_generator(1, "low"))
    for module, rank in ranks.items():
        m, n = SHAPES[module]
        left, right = torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw)
        if module == "low":
            left, right = basis[0] @ left[:LOW], right[:, :LOW] @ basis[1]
        if rank:
            tensors |= {Name(module, "U"): left, Name(module, "V"): right}
    if factors:
        tensors[Name("wide", "A" if number % 2 else "B")] = torch.randn(3, 3, generator=draw)
    return State(tensors)


def assert_same(log: FrozenLog, twin: FrozenLog) -> None:
    """Hold what a log answers to every holder, and what it hands over itself, against one that was never folded."""
    assert (log.heads, dict(log.first)) == (twin.heads, dict(twin.first))
    for since in range(log.version + 1):
        mine, theirs = log.bundle(since), twin.bundle(since)
        assert (mine is None) == (theirs is None)
        if mine is None or theirs is None:
            continue
        assert (mine.parent, mine.head, mine.one_off) == (theirs.parent, theirs.head, theirs.one_off)
        assert list(mine.state) == list(theirs.state)
        assert all(map(torch.equal, mine.state.values(), theirs.state.values()))
    assert log.sha256(State()) == twin.sha256(State())
    assert log.view().basis.keys() == twin.view().basis.keys()
    assert log.view().residuals.keys() == twin.view().residuals.keys()
    for module, residual in log.view().residuals.items():
        one, other = (each.apart(as_factors=module in log.as_factors) for each in (residual, twin.view().residuals[module]))
        assert one.versioned.keys() == other.versioned.keys()
        assert all(map(torch.equal, sum(one.pairs, ()), sum(other.pairs, ())))
        assert (one.dense is None) == (other.dense is None)
        assert torch.equal(one.matrix(), other.matrix())


@settings(max_examples=25, deadline=None)
@given(HISTORIES, st.sets(st.sampled_from(list(SHAPES))), st.integers(1, 2), st.data())
def test_folded_or_not_every_holder_is_sent_the_same_bits(
    history: list[tuple[dict[str, int], bool]], as_factors: set[str], keep: int, data: st.DataObject
) -> None:
    """Saved, taken up again and asked at any versions; deltas lie in memory, or in their files alone."""
    log, twin = FrozenLog(), FrozenLog()
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_files, "REST_BYTES", data.draw(st.sampled_from([1, log_files.REST_BYTES]), label="lie in files from"))
        for number, (ranks, factors) in enumerate(history, start=1):
            log.as_factors = twin.as_factors = as_factors
            for each in (log, twin):
                each.append(delta_of(ranks, number, factors=factors))
            if data.draw(st.booleans(), label="asked before it is saved"):
                log.bundle(0)
            event = data.draw(st.sampled_from(["goes on", "saved", "resumed"]), label="after the round")
            if event != "goes on":
                save_checkpoint(Path(name), Snapshot(number, State(), log), keep=keep)
            if event == "resumed":
                log = load_checkpoint(Path(name)).frozen
                log.as_factors = as_factors
            if data.draw(st.booleans(), label="asked") or number == len(history):
                assert_same(log, twin)


def grown(folder: Path, rounds: range, log: FrozenLog, *, keep: int = 1, rank: int = 2) -> FrozenLog:
    for number in rounds:
        log.append(delta_of(dict.fromkeys(SHAPES, rank), number, factors=True))
        save_checkpoint(folder, Snapshot(number, State(), log), keep=keep)
    return log


def twin_of(rounds: int, *, rank: int = 2) -> FrozenLog:
    twin = FrozenLog()
    for number in range(1, rounds + 1):
        twin.append(delta_of(dict.fromkeys(SHAPES, rank), number, factors=True))
    return twin


@pytest.mark.parametrize("keep", [1, 2])
def test_the_folder_stays_within_a_matrix_and_a_generation_of_deltas(tmp_path: Path, keep: int) -> None:
    log, matrix = FrozenLog(), 4 * sum(m * n for m, n in SHAPES.values())
    one = 4 * delta_of(dict.fromkeys(SHAPES, 2), 1, factors=True).numel
    for number in range(1, 41):
        grown(tmp_path, range(number, number + 1), log, keep=keep)
        files = [path for path in tmp_path.iterdir() if not path.name.startswith("round-")]
        # Ranks of 4 or 5 outweigh no matrix: two deltas are kept that somebody may lack, and one more while a round is there that needs it.
        assert len([path for path in files if path.name.startswith("frozen-")]) <= 2 + keep
        values = sum(path.stat().st_size - 2048 for path in files)  # less what stands before them
        assert values <= keep * matrix + (2 + keep) * one
    assert_same(log, twin_of(40))


def test_what_is_written_again_is_never_more_than_the_deltas_that_came(tmp_path: Path) -> None:
    log, matrix, written, added = FrozenLog(), sum(m * n for m, n in SHAPES.values()), 0, 0
    for number in range(1, 41):
        before = log.folded.version
        added += delta_of(dict.fromkeys(SHAPES, 1), number).numel
        grown(tmp_path, range(number, number + 1), log, rank=1)
        written += matrix if log.folded.version > before else 0
    assert 0 < written <= added


def test_the_older_checkpoint_finds_what_it_builds_on(tmp_path: Path) -> None:
    """Whenever the last one turns out to be damaged: before the first fold, at one, and between two."""
    for rounds in (2, 3, 4, 5, 7):
        folder = tmp_path / str(rounds)
        grown(folder, range(1, rounds + 1), FrozenLog(), keep=2)
        (folder / f"round-{rounds:04d}.safetensors").write_bytes(b"torn")
        found = load_checkpoint(folder)
        assert found.round == rounds - 1
        assert_same(found.frozen, twin_of(rounds - 1))
        assert_same(grown(folder, range(rounds, 10), found.frozen, keep=2), twin_of(9))


class Killed(BaseException):
    """Ends a process at once, as far as a process can do that to itself."""


def dying(real: Callable[..., Any], life: list[int], *, after: bool) -> Callable[..., Any]:
    def once(*arguments: Any, **named: Any) -> Any:
        life[0] -= 1
        if life[0] < 0 and not after:
            raise Killed
        found = real(*arguments, **named)
        if life[0] < 0:
            raise Killed
        return found

    return once


@pytest.mark.parametrize("after", [False, True])
def test_killed_before_or_after_any_write_or_removal_it_goes_on_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Each file of a sum, each delta and round, and each file that is removed; the process that goes on knows nothing of what was there."""
    monkeypatch.setattr(log_files, "REST_BYTES", 500)
    twin, died = twin_of(6), 0
    grown(tmp_path / "begun", range(1, 4), FrozenLog(), keep=2)
    for moment in range(200):
        folder, life = tmp_path / str(moment), [moment]
        shutil.copytree(tmp_path / "begun", folder)
        with monkeypatch.context() as patch:
            fatal = partial(dying, life=life, after=after)
            for module in (log_files, checkpoint):
                patch.setattr(module, "write_whole", fatal(write_whole))
            patch.setattr(Path, "unlink", fatal(Path.unlink))
            patch.setattr(log_files, "_WHOLE", {})
            try:
                grown(folder, range(4, 6), load_checkpoint(folder).frozen, keep=2)
                break
            except Killed:
                died += 1
        monkeypatch.setattr(log_files, "_WHOLE", {})
        found = load_checkpoint(folder)
        grown(folder, range(found.round + 1, 7), found.frozen, keep=2)
        assert_same(load_checkpoint(folder).frozen, twin)
        needed = {path for round_file in folder.glob("round-*") for path in files_behind(round_file)}
        assert set(log_files.files_in(folder)) == needed
    assert died >= 8


def files_behind(path: Path) -> set[Path]:
    return log_files.files_of(path.parent, read_whole(path)[1])


def test_a_damaged_or_lost_sum_is_found(tmp_path: Path) -> None:
    harms: list[Callable[[Path], Any]] = [lambda path: path.write_bytes(path.read_bytes()[:-4] + b"oops"), Path.unlink]
    for number, harm in enumerate(harms):
        folder = tmp_path / str(number)
        grown(folder, range(1, 6), FrozenLog())
        harm(next(folder.glob("folded-*")))
        with pytest.raises(RunError, match=r"no checkpoint can be used: .*folded-"):
            load_checkpoint(folder)


def test_a_folder_of_the_format_before_goes_on_to_the_same(tmp_path: Path) -> None:
    """It holds all deltas that add to the frozen weights, and no sums."""
    log = twin_of(6)
    for version, delta in log.deltas().items():
        head = log.heads[version]
        write_whole(tmp_path / f"frozen-{version:04d}-{head[:8]}.safetensors", tensors_of({"state": delta}), {"head": head})
    first = [[*name, version] for name, version in log.first.items()]
    facts = {"format": 2, "round": 6, "frozen": log.heads[1:], "there": list(log.deltas()), "first": first, "run": "", "facts": {}}
    write_whole(tmp_path / "round-0006.safetensors", {}, facts)
    found = load_checkpoint(tmp_path)
    assert_same(found.frozen, log)
    again = grown(tmp_path, range(7, 10), found.frozen)
    assert len(list(log_files.files_in(tmp_path))) < 9
    assert_same(again, twin_of(9))
    assert_same(load_checkpoint(tmp_path).frozen, twin_of(9))
