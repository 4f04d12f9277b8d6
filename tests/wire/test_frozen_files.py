"""The cache's files lie in its folder, one a head whoever writes it, on cache lines, and a damaged one is as good as none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from fedsb.core.state import LINE, Name, State
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenLog, FrozenMissing
from fedsb.wire.frozen_cache import FrozenCache
from tests.wire.logs import assert_holds, basis, gaussian, log_of, over_the_wire


def test_a_head_leads_to_no_file_outside_the_cache(tmp_path: Path) -> None:
    """It comes from the server."""
    store = FrozenCache(tmp_path / "cache")
    for head in ("../ours", "/tmp/ours", "a/b", "", ".."):
        with pytest.raises(ValueError, match="is no head of a frozen log"):
            store.receive(FrozenBundle(ROOT, head, State()))
        with pytest.raises(ValueError, match="is no head of a frozen log"):
            store.load(head)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "removed", "swapped"])
def test_a_damaged_file_is_as_good_as_none(folder: Path, damage: str) -> None:
    log = log_of([{"wide": 2}, {"wide": 1}], with_basis=True)
    store = FrozenCache(folder)
    for since in range(log.version):
        bundle = FrozenBundle(log.heads[since], log.heads[since + 1], one_step(log, since))
        store.receive(bundle)
    path = folder / f"{log.heads[2]}.safetensors"
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "swapped":
        path.write_bytes((folder / f"{log.heads[3]}.safetensors").read_bytes())
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"cut": content[:-10], "flipped": flipped, "emptied": b""}[damage])
    with pytest.raises(FrozenMissing):
        FrozenCache(folder).load(log.head)
    again = FrozenCache(folder)
    again.receive(over_the_wire(log.bundle(0)))  # type: ignore[arg-type]
    assert_holds(again.load(log.head), log, log.version)


def one_step(log: FrozenLog, since: int) -> State:
    """Return what a bundle of the single version after ``since`` holds."""
    return State({Name(n.module, f"{n.role}@{since + 1}"): t for n, t in log.deltas()[since + 1].items()})


def test_a_damaged_file_is_written_anew_when_its_bundle_comes_again(folder: Path) -> None:
    log = log_of([{"wide": 2}], with_basis=False)
    bundle = log.bundle(0)
    assert bundle is not None
    FrozenCache(folder).receive(bundle)
    (folder / f"{log.head}.safetensors").write_bytes(b"rubbish")
    store = FrozenCache(folder)
    store.receive(bundle)
    assert_holds(store.load(log.head), log, 1)
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors"]


@pytest.mark.parametrize("names", [1, 2, 3, 5, 8])
def test_what_is_read_begins_on_a_cache_line(folder: Path, names: int) -> None:
    """Where a factor lies decides the last bits of a product: a mapped one must give those of a copy."""
    log = FrozenLog()
    sizes = {f"{'m' * (3 * i + names)}": 16 * (i + 1) for i in range(names)}
    log.append(State({Name(module, "A"): gaussian(4, n, seed=i) for i, (module, n) in enumerate(sizes.items())}))
    store = FrozenCache(folder)
    store.receive(over_the_wire(log.bundle(0)))
    tensors = store.load(log.head).basis
    assert all(t.data_ptr() % LINE == 0 for t in tensors.values())
    assert_holds(store.load(log.head), log, 1)
    begins = sorted((t.data_ptr(), t.nbytes) for t in tensors.values())
    assert all(here + size == there for (here, size), (there, _) in pairwise(begins)), "one mapping, and no copies"


def test_a_factor_whose_neighbour_ends_off_a_line_is_copied_to_one(folder: Path) -> None:
    log = FrozenLog()
    log.append(State({Name(module, "A"): gaussian(3, 5, seed=i) for i, module in enumerate("abc")}))
    store = FrozenCache(folder)
    store.receive(over_the_wire(log.bundle(0)))
    assert all(t.data_ptr() % LINE == 0 for t in store.load(log.head).basis.values())
    assert_holds(store.load(log.head), log, 1)


def test_processes_that_receive_the_same_at_once_keep_one_file(folder: Path) -> None:
    log = FrozenLog()
    log.append(basis())
    bundle = over_the_wire(log.bundle(0))
    for turn in range(20):
        shared = folder / str(turn)
        with ThreadPoolExecutor(4) as pool:
            held = list(pool.map(lambda store: (store.receive(bundle), inode(store, log))[1], [FrozenCache(shared) for _ in range(4)]))
        assert len(set(held)) == 1
        assert [path.suffix for path in shared.iterdir()] == [".safetensors"]


def inode(store: FrozenCache, log: FrozenLog) -> int:
    return (store.folder / f"{log.head}.safetensors").stat().st_ino


@pytest.mark.parametrize(("this", "that"), [(b"A@1|m", b"A@1xm"), (b'"parent"', b'"parenu"'), (b'"sha256"', b'"sha257"')])
def test_a_damaged_header_is_repaired_like_damaged_values(folder: Path, this: bytes, that: bytes) -> None:
    log = FrozenLog()
    log.append(State({Name("m", "A"): gaussian(4, 16, seed=0)}))
    FrozenCache(folder).receive(log.bundle(0))
    path = folder / f"{log.head}.safetensors"
    whole = path.read_bytes()
    assert this in whole
    path.write_bytes(whole.replace(this, that))
    with pytest.raises(FrozenMissing):
        FrozenCache(folder).load(log.head)
    FrozenCache(folder).receive(log.bundle(0))
    assert_holds(FrozenCache(folder).load(log.head), log, 1)
