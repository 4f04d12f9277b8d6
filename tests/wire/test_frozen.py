"""The frozen log: whatever a client missed or lost, it ends with the bits of a slow loop over all deltas."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters.residual import dense_is_cheaper
from fedsb.core.errors import RunError
from fedsb.core.rng import torch_generator
from fedsb.core.state import LINE, Name, State
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenLog, FrozenMissing, FrozenView
from fedsb.wire.frozen_cache import FrozenCache
from fedsb.wire.messages import Instruction, decode_instruction, encode_instruction, encode_shared

law = settings(max_examples=25, deadline=None)
SHAPES = {"wide": (5, 12), "tall": (12, 5), "square": (7, 7)}
# Per version: the rank of the residual of each module, 0 where the version does not touch it.
ranks = st.lists(st.fixed_dictionaries({module: st.integers(0, 3) for module in SHAPES}), min_size=1, max_size=6)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def basis(seed: int = 0) -> State:
    """Return B (m, 2) and A (2, n) of every module."""
    pairs = {module: (gaussian(m, 2, seed=seed), gaussian(2, n, seed=seed + 1)) for module, (m, n) in SHAPES.items()}
    return State({Name(module, role): t for module, pair in pairs.items() for role, t in zip("BA", pair, strict=True)})


def delta(versions: dict[str, int], seed: int) -> State:
    """Return residual factors of the given ranks; U is not contiguous, as a server's may not be."""
    tensors: dict[Name, Tensor] = {}
    for module, rank in versions.items():
        m, n = SHAPES[module]
        if rank:
            tensors[Name(module, "U")] = gaussian(rank, m, seed=seed).T
            tensors[Name(module, "V")] = gaussian(rank, n, seed=seed + 1)
    return State(tensors)


def log_of(versions: Sequence[dict[str, int]], *, with_basis: bool) -> FrozenLog:
    log = FrozenLog()
    if with_basis:
        log.append(basis())
    for number, version in enumerate(versions):
        log.append(delta(version, seed=10 * number))
    return log


def oracle(deltas: Sequence[State]) -> dict[str, Tensor]:
    """Add ``U V`` up in version order, as a slow loop does."""
    residuals: dict[str, Tensor] = {}
    for one in deltas:
        for module in one.modules:
            if Name(module, "U") in one:
                start = residuals.get(module, torch.zeros(SHAPES[module]))
                residuals[module] = torch.addmm(start, one[Name(module, "U")].contiguous(), one[Name(module, "V")].contiguous())
    return residuals


def over_the_wire(bundle: FrozenBundle) -> FrozenBundle:
    content = encode_instruction(Instruction("a", 1, frozen=bundle.head), encode_shared(encode_arrays(State()), bundle))
    received = decode_instruction(content).bundle
    assert received is not None
    return received


def assert_holds(frozen: FrozenView, log: FrozenLog, version: int) -> None:
    deltas = [delta for number, delta in log.deltas().items() if number <= version]
    wanted = oracle(deltas)
    assert frozen.residuals.keys() == wanted.keys()
    assert all(torch.equal(t.matrix(), wanted[module]) for module, t in frozen.residuals.items())
    expected = {n: t for one in deltas for n, t in one.pick("A", "B").items()}
    assert frozen.basis.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in frozen.basis.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fresh_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="frozen-test-"))


@law
@given(ranks, st.booleans(), st.data())
def test_any_chain_of_bundles_leads_to_the_same_bits(versions: list[dict[str, int]], with_basis: bool, data: st.DataObject) -> None:
    """A client that is asked at some versions, now and then in a fresh process and now and then with an empty disk."""
    log = FrozenLog()
    cache = fresh_folder()
    store, held = FrozenCache(cache), 0
    steps = (
        [basis(), *(delta(v, 10 * i) for i, v in enumerate(versions))] if with_basis else [delta(v, 10 * i) for i, v in enumerate(versions)]
    )
    for step in steps:
        log.append(step)
        if not data.draw(st.booleans(), label="takes part") and step is not steps[-1]:
            continue
        event = data.draw(st.sampled_from(["goes on", "fresh process", "lost disk"]), label="before")
        if event != "goes on":
            store = FrozenCache(cache)
        if event == "lost disk":
            shutil.rmtree(cache, ignore_errors=True)
            if held:
                with pytest.raises(FrozenMissing):
                    store.load(log.heads[held])
            held = 0
        if bundle := log.bundle(held):
            store.receive(over_the_wire(bundle))
        assert_holds(store.load(log.head), log, log.version)
        held = log.version
    assert_holds(log.view(), log, log.version)
    shutil.rmtree(cache, ignore_errors=True)


def test_a_head_leads_to_no_file_outside_the_cache(tmp_path: Path) -> None:
    """It comes from the server."""
    store = FrozenCache(tmp_path / "cache")
    for head in ("../ours", "/tmp/ours", "a/b", "", ".."):
        with pytest.raises(ValueError, match="is no head of a frozen log"):
            store.receive(FrozenBundle(ROOT, head, State()))
        with pytest.raises(ValueError, match="is no head of a frozen log"):
            store.load(head)
    assert not list(tmp_path.rglob("*.safetensors"))


@law
@given(ranks, st.booleans(), st.data())
def test_catching_up_from_any_version(versions: list[dict[str, int]], with_basis: bool, data: st.DataObject) -> None:
    log = log_of(versions, with_basis=with_basis)
    since = data.draw(st.integers(0, log.version))
    cache = fresh_folder()
    early = FrozenLog()
    for number, step in log.deltas().items():
        if number <= since:
            early.append(step)
    store = FrozenCache(cache)
    if first := early.bundle(0):
        store.receive(first)
    if rest := log.bundle(since):
        store.receive(rest)
    assert_holds(store.load(log.head), log, log.version)
    assert_holds(store.load(early.head), log, since)  # and back again
    shutil.rmtree(cache, ignore_errors=True)


@law
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_the_dense_sum_goes_exactly_where_it_is_smaller(rank_by_version: list[int]) -> None:
    """Of rank ρ, factors hold ρ (m + n) values and the sum m n: dense where ρ > m n / (m + n)."""
    versions = [dict.fromkeys(SHAPES, rank) for rank in rank_by_version]
    log = log_of(versions, with_basis=False)
    for since in range(log.version):
        bundle = log.bundle(since)
        assert bundle is not None
        for module, (m, n) in SHAPES.items():
            roles = {name.role[0] for name in bundle.state if name.module == module}
            total = sum(rank_by_version[since:])
            assert roles == ({"D"} if total > m * n / (m + n) else {"U", "V"})
            values = sum(t.numel() for name, t in bundle.state.items() if name.module == module)
            assert values == min(m * n, total * (m + n))


@pytest.mark.parametrize(("rank", "dense"), [(2, False), (3, False), (4, True)])
def test_at_equal_size_factors_are_sent(rank: int, dense: bool) -> None:
    """6 · 6 / (6 + 6) = 3."""
    assert dense_is_cheaper(rank, 6, 6) is dense


def test_the_basis_goes_along_where_a_sum_is_sent_densely(folder: Path) -> None:
    log = log_of([dict.fromkeys(SHAPES, 3)] * 3, with_basis=True)
    bundle = log.bundle(0)
    assert bundle is not None
    assert {name.role[0] for name in bundle.state} == {"A", "B", "D"}
    assert bundle.one_off == sum(t.numel() for name, t in bundle.state.items() if name.role[0] in "AB")
    store = FrozenCache(folder)
    store.receive(bundle)
    assert_holds(store.load(log.head), log, log.version)


def test_a_bundle_does_not_change_when_the_log_grows() -> None:
    log = log_of([dict.fromkeys(SHAPES, 3)] * 2, with_basis=False)
    bundle = log.bundle(0)
    assert bundle is not None
    before = {name: t.clone() for name, t in bundle.state.items()}
    log.append(delta(dict.fromkeys(SHAPES, 1), seed=99))
    assert all(torch.equal(t, before[name]) for name, t in bundle.state.items())


def test_heads_name_the_content_of_the_whole_chain() -> None:
    one, same = (log_of([{"wide": 1}, {"tall": 2}], with_basis=True) for _ in range(2))
    assert one.heads == same.heads
    assert len(set(one.heads)) == one.version + 1
    assert one.heads[0] == ROOT
    other = FrozenLog()
    changed = delta({"wide": 1}, seed=0)
    changed[Name("wide", "U")][0, 0] += 2.0**-20
    for step in (basis(), changed, delta({"tall": 2}, seed=10)):
        other.append(step)
    assert other.heads[1] == one.heads[1]
    assert other.heads[2] != one.heads[2]
    assert other.heads[3] != one.heads[3]  # the third delta is the same, its past is not


def test_the_same_values_under_another_name_or_shape_have_another_head() -> None:
    heads = set()
    for module, shape in (("a", (2, 3)), ("b", (2, 3)), ("a", (3, 2))):
        log = FrozenLog()
        log.append(State({Name(module, "A"): torch.zeros(shape)}))
        heads.add(log.head)
    assert len(heads) == 3


def test_an_empty_delta_changes_nothing() -> None:
    log = FrozenLog()
    log.append(State())
    assert (log.version, log.head, log.bundle(0)) == (0, ROOT, None)


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


def test_an_unknown_head_is_missing_and_leaves_the_view_as_it_was(folder: Path) -> None:
    log = log_of([{"wide": 2}], with_basis=False)
    store = FrozenCache(folder)
    store.receive(log.bundle(0))  # type: ignore[arg-type]
    store.load(log.head)
    with pytest.raises(FrozenMissing):
        store.load("f" * 32)
    assert_holds(store.load(log.head), log, 1)


def test_a_circle_of_parents_ends(folder: Path) -> None:
    store = FrozenCache(folder)
    factors = State({Name("wide", "A@1"): torch.zeros(2, 12)})
    for parent, head in (("a" * 32, "b" * 32), ("b" * 32, "a" * 32)):
        store.receive(FrozenBundle(parent, head, factors))
    with pytest.raises(FrozenMissing):
        store.load("a" * 32)


def test_the_root_needs_no_file(folder: Path) -> None:
    frozen = FrozenCache(folder).load(ROOT)
    assert (len(frozen.basis), frozen.residuals) == (0, {})


def test_a_load_that_fails_halfway_leaves_nothing_half_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, store = FrozenLog(), FrozenCache(tmp_path)
    for seed in (1, 2):
        log.append(delta(dict.fromkeys(SHAPES, 2), seed))
        bundle = log.bundle(seed - 1)
        assert bundle is not None
        store.receive(bundle)
    apply, calls = FrozenView.apply, []

    def failing(self: FrozenView, bundle: FrozenBundle) -> None:
        calls.append(bundle.head)
        if len(calls) == 2:
            raise MemoryError
        apply(self, bundle)

    monkeypatch.setattr(FrozenView, "apply", failing)
    with pytest.raises(MemoryError):
        store.load(log.head)
    found, expected = store.load(log.head).residuals, log.view().residuals
    assert all(torch.equal(found[module].matrix(), expected[module].matrix()) for module in SHAPES)


def test_a_delta_that_overflowed_stops_the_run_and_leaves_the_log_alone() -> None:
    log = log_of([dict.fromkeys(SHAPES, 1)], with_basis=False)
    head, poisoned = log.head, delta(dict.fromkeys(SHAPES, 1), 5)
    poisoned[Name("tall", "V")][0, 0] = float("inf")
    with pytest.raises(RunError, match="the frozen weight of 'tall'"):
        log.append(poisoned)
    assert (log.head, log.version) == (head, 1)
