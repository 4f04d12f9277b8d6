"""Whatever versions a client missed or lost, it ends with the bits of a slow loop over all deltas, or knows what is missing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.state import Name, State
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenLog, FrozenMissing, FrozenView
from fedsb.wire.frozen_cache import FrozenCache
from tests.wire.logs import SHAPES, assert_holds, basis, delta, law, log_of, over_the_wire, ranks


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
