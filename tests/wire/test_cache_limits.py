"""What a cache may keep: by the time of last use, and by size, the oldest first."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from fedsb.core.state import Name, State
from fedsb.wire.cache_limits import DAY, GB, Limits, prune
from fedsb.wire.frozen import FrozenLog, FrozenMissing
from fedsb.wire.frozen_cache import FrozenCache

NOW = 10.0**9


def filled(folder: Path) -> None:
    """Make files of 100 bytes that were used 1 to 4 days ago, and a folder."""
    (folder / "in").mkdir()
    for days in range(1, 5):
        (folder / f"{days}").write_bytes(bytes(100))
        os.utime(folder / f"{days}", (NOW, NOW - days * DAY))


@pytest.mark.parametrize(
    ("limits", "spared", "left"),
    [
        (Limits(), (), "1234"),
        (Limits(days=2.5), (), "12"),
        (Limits(days=2.5), ("3",), "123"),
        (Limits(gb=250 / GB), (), "12"),
        (Limits(gb=250 / GB), ("4",), "14"),
        (Limits(days=1.5, gb=350 / GB), (), "1"),
        (Limits(gb=1 / GB), (), ""),
    ],
)
def test_the_longest_unused_go_first(limits: Limits, spared: Collection[str], left: str, tmp_path: Path) -> None:
    filled(tmp_path)
    gone = prune(tmp_path, limits, {tmp_path / name for name in spared}, NOW)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(left)
    assert sorted(path.name for path in gone) == sorted(set("1234") - set(left))


def test_a_client_holds_its_folder_to_the_limits_and_asks_for_what_is_gone(tmp_path: Path) -> None:
    log = FrozenLog()
    log.append(State({Name("a", "A"): torch.ones(2, 3)}))
    first = log.head
    FrozenCache(tmp_path).take(log.bundle(0), first, "one", back=1)
    (old,) = tmp_path.glob(f"{first}*")
    os.utime(old, (0, 0))
    other = FrozenLog()
    other.append(State({Name("a", "A"): torch.zeros(2, 3)}))
    store = FrozenCache(tmp_path, limits=Limits(days=30))
    store.take(other.bundle(0), other.head, "two", back=1)
    assert not old.exists()
    assert len(FrozenCache(tmp_path).load(other.head).basis) == 1
    with pytest.raises(FrozenMissing):
        FrozenCache(tmp_path).load(first)


def test_a_process_that_serves_run_after_run_keeps_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsb.wire.frozen_cache.PAUSE_S", -1.0)
    cache = FrozenCache(tmp_path, limits=Limits(gb=5000 / GB))
    for run in range(5):
        log = FrozenLog()
        log.append(State({Name("m", "B"): torch.full((30, 30), float(run))}))
        cache.take(log.bundle(0), log.head, f"{run:x}", back=2)
    assert len([path for path in tmp_path.iterdir() if path.is_file()]) == 1
    assert float(cache.load(log.head).basis[Name("m", "B")][0, 0]) == 4
