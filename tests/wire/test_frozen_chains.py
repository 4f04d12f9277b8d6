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
        assert store.load(log.head).content() == log.view().content()
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
    assert store.load(log.head).content() == log.view().content()
    assert_holds(store.load(early.head), log, since)  # and back again
    assert store.load(early.head).content() == early.view().content()
    shutil.rmtree(cache, ignore_errors=True)


@law
@given(ranks, st.lists(st.booleans(), min_size=6, max_size=6))
def test_what_is_held_as_factors_has_one_digest_too(versions: list[dict[str, int]], here: list[bool]) -> None:
    """Of a client that was there in some rounds, of one that comes last, and of the server's."""
    log, cache, held = FrozenLog(), fresh_folder(), 0
    log.as_factors = {*SHAPES}
    store = FrozenCache(cache / "one", as_factors=True)
    for number, (version, takes_part) in enumerate(zip(versions, here, strict=False)):
        log.append(delta(version, 10 * number))
        if takes_part and (bundle := log.bundle(held)):
            store.receive(over_the_wire(bundle))
            assert store.load(log.head).content(SHAPES) == log.view().content(SHAPES)
            held = log.version
    late = FrozenCache(cache / "other", as_factors=True)
    if bundle := log.bundle(0):
        late.receive(over_the_wire(bundle))
    assert late.load(log.head).content(SHAPES) == log.view().content(SHAPES)
    shutil.rmtree(cache, ignore_errors=True)


ONE = {Name("x", "B"): torch.ones(2, 2), Name("x", "U"): torch.ones(3, 1), Name("x", "V"): torch.ones(1, 3)}
OTHERS = {
    "a value of a factor": ONE | {Name("x", "B"): torch.tensor([[1.0, 1], [1, 2]])},
    "a factor of another name": {name: t for name, t in ONE.items() if name.role != "B"} | {Name("x", "A"): torch.ones(2, 2)},
    "a factor of another shape": ONE | {Name("x", "B"): torch.ones(4, 1)},
    "another addition": ONE | {Name("x", "V"): torch.full((1, 3), 0.5)},
    "one of the same product, which processors round otherwise": ONE
    | {Name("x", "U"): 2 * ONE[Name("x", "U")], Name("x", "V"): torch.full((1, 3), 0.5)},
    "no addition": {Name("x", "B"): torch.ones(2, 2)},
    "an addition of nothing to another module": ONE | {Name("y", "U"): torch.zeros(3, 1), Name("y", "V"): torch.zeros(1, 3)},
}


@pytest.mark.parametrize("as_factors", [(), ("x", "y")])
@pytest.mark.parametrize("how", OTHERS)
def test_a_digest_is_of_all_that_is_held_whatever_it_is_called(how: str, as_factors: tuple[str, ...]) -> None:
    digests = []
    for content in (ONE, OTHERS[how]):
        view = FrozenView()
        view.apply(FrozenBundle(ROOT, "a" * 32, State({Name(name.module, f"{name.role}@1"): t for name, t in content.items()})))
        digests.append(view.content(as_factors))
    assert digests[0] != digests[1]
    view.apply(FrozenBundle("a" * 32, "a" * 32, State({Name("x", "D@2"): torch.full((3, 3), 2.0)})))
    assert view.content(as_factors) != digests[1]


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
