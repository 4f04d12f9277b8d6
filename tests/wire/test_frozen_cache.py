"""A client's cache of the frozen log: what is superseded goes, and whoever shares it ends with the bits of the server."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsb.adapters.frozen_part import FrozenPart
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.cost.table import cost_of
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenLog, FrozenMissing, FrozenView
from fedsb.wire.frozen_cache import SPARE, FrozenCache
from tests.strategies.federations import classification, federate

RUN, KEEP = "c0ffee", 4
KINDS = {"turns": ((), ()), "beside a fixed one": (("A",), ()), "beside what is added": ((), ("U", "V"))}


def deltas_of(number: int, turns: int, fixed: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> list[State]:
    """Return deltas of factors that learn in turns, the first with all of them and with what never learns; something is added at times."""
    draw, names = torch_generator(number, "cache"), [f"F{turn}" for turn in range(turns)]

    def some(*roles: str) -> State:
        return State({Name(module, role): torch.randn(4, 4, generator=draw) for module in ("x", "y") for role in roles})

    return [some(*names, *fixed), *(some(names[v % turns], *(added if v % 3 == 0 else ())) for v in range(1, number))]


def log_of(deltas: list[State]) -> FrozenLog:
    log = FrozenLog()
    for delta in deltas:
        log.append(delta)
    return log


def assert_holds(found: FrozenView, log: FrozenLog) -> None:
    wanted = log.view()
    assert found.basis.keys() == wanted.basis.keys()
    assert all(torch.equal(t, wanted.basis[name]) for name, t in found.basis.items())
    assert found.residuals.keys() == wanted.residuals.keys()
    assert all(torch.equal(added.matrix(), wanted.residuals[name].matrix()) for name, added in found.residuals.items())
    assert found.content() == wanted.content()


def asked(store: FrozenCache, log: FrozenLog, held: int) -> int:
    """Bring a cache to the head of a log as a client that holds a version would; return how often it had to be sent all of it."""
    if bundle := log.bundle(held):
        store.receive(bundle)
    missing = 0
    try:
        found = store.load(log.head)
    except FrozenMissing:
        missing = 1
        store.receive(log.bundle(0))  # type: ignore[arg-type]
        found = store.load(log.head)
    assert_holds(found, log)
    store.tidy(RUN, KEEP)
    return missing


def files(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


@settings(max_examples=25, deadline=None)
@given(st.integers(6, 30), st.integers(1, 3), st.sampled_from(list(KINDS)), st.randoms(use_true_random=False))
def test_clients_that_share_a_cache_lack_nothing_and_leave_little(number: int, turns: int, kind: str, chance: Random) -> None:
    """Three clients, each in some rounds only, served by two processes that go on and by fresh ones."""
    with TemporaryDirectory() as name:
        folder, log, held, missing = Path(name), FrozenLog(), dict.fromkeys("abc", 0), 0
        stores = [FrozenCache(folder) for _ in range(2)]
        for delta in deltas_of(number, turns, *KINDS[kind]):
            log.append(delta)
            for client in held:
                if chance.random() < 0.6:
                    missing += asked(chance.choice([*stores, FrozenCache(folder)]), log, held[client])
                    held[client] = log.version
        if kind == "turns":
            assert not missing
        if kind != "beside what is added":
            # One for each kept head, for the last version of each that learns, and for that of what never does.
            assert files(folder) <= KEEP + turns + len(KINDS[kind][0]) + SPARE
        assert len(list(folder.iterdir())) <= files(folder) + 1
        asked(FrozenCache(folder), log, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_run_that_goes_back_finds_what_it_had(turns: int, kind: str, tmp_path: Path) -> None:
    deltas, store = deltas_of(30, turns, *KINDS[kind]), FrozenCache(tmp_path)
    for version in range(1, 31):
        assert not asked(store, log_of(deltas[:version]), version - 1)
    for version in range(31 - KEEP, 31):
        log = log_of(deltas[:version])
        assert_holds(FrozenCache(tmp_path).load(log.head), log)
        for held in range(version - 1 if kind != "turns" else 0, version):
            assert not asked(FrozenCache(tmp_path), log, held)


@pytest.mark.parametrize("last", range(5))
def test_ended_while_it_tidies_a_cache_leads_where_it_did(last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas, store = deltas_of(KEEP + SPARE + 1, 2), FrozenCache(tmp_path)
    for version in range(1, len(deltas)):
        asked(store, log_of(deltas[:version]), version - 1)
    log, left = log_of(deltas), iter(range(last))
    replace, unlink = os.replace, Path.unlink

    def mortal(step):  # type: ignore[no-untyped-def]
        def taken(*given, **how):  # type: ignore[no-untyped-def]
            if Path(given[-1]).suffix == ".safetensors" and next(left, None) is None:
                raise KeyboardInterrupt
            return step(*given, **how)

        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", mortal(replace))
        patch.setattr(Path, "unlink", mortal(unlink))
        with pytest.raises(KeyboardInterrupt):
            asked(store, log, log.version - 1)
    for version in range(len(deltas) - KEEP + 1, len(deltas) + 1):
        assert_holds(FrozenCache(tmp_path).load(log.heads[version]), log_of(deltas[:version]))
    assert not asked(FrozenCache(tmp_path), log, log.version - 1)
    assert files(tmp_path) <= KEEP + 2 + SPARE


def test_processes_that_tidy_at_once_lose_nothing_that_they_cannot_be_sent(tmp_path: Path) -> None:
    deltas = deltas_of(40, 2)
    logs = [log_of(deltas[:version]) for version in range(1, 41)]

    def client(number: int) -> None:
        store = FrozenCache(tmp_path)
        for held, log in enumerate(logs):
            asked(store if number else FrozenCache(tmp_path), log, held)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    assert_holds(FrozenCache(tmp_path).load(logs[-1].head), logs[-1])
    assert files(tmp_path) <= KEEP + 2 + SPARE
    assert not list(tmp_path.glob("*.part"))


def test_ten_rounds_leave_a_few_files(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    more = ("method=rolora", "federation.num_rounds=10", "federation.fraction=0.6", "train.local_steps=1", "keep_checkpoints=1")
    federation = federate([*classification(tiny_bert, tiny_csv), *more])
    cost = cost_of(federation.config)
    assert federation.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert not any(record.failed for record in federation.records)
    folder, log = tmp_path / "home" / "frozen", federation.frozen
    # The last round's factor is sent to nobody.
    head = log.heads[-2]
    assert files(folder) < log.version - 1
    held = FrozenCache(folder, as_factors=True).load(head)
    late = FrozenCache(tmp_path / "late", as_factors=True)
    late.receive(log.bundle(0))  # type: ignore[arg-type]
    assert_holds(late.load(log.head), log)
    role = next(iter(log.deltas()[log.version - 1])).role
    assert all(torch.equal(t, log.view().basis[name]) for name, t in held.basis.pick(role).items())


def test_what_one_run_calls_by_a_head_is_nothing_to_another(tmp_path: Path) -> None:
    """Heads of starts that everybody can compute can be computed by a server that sends something else under them."""
    log = FrozenLog()
    log.append(State({Name("m", "B"): torch.ones(2, 2)}))
    bundle = log.bundle(0)
    assert bundle is not None
    poisoned = FrozenBundle(bundle.parent, bundle.head, bundle.state.map(lambda t: 666 * t))
    FrozenCache(tmp_path, owner="a").take(poisoned, log.head, "a", back=1)
    mine = FrozenCache(tmp_path, owner="b")
    with pytest.raises(FrozenMissing):
        mine.load(log.head)
    assert float(mine.take(bundle, log.head, "b", back=1).basis[Name("m", "B")].max()) == 1
    assert float(FrozenCache(tmp_path, owner="b").load(log.head).basis[Name("m", "B")].max()) == 1


@pytest.mark.parametrize("hold", ["auto", "dense", "merge"])
def test_a_node_trains_with_what_it_was_sent_whatever_another_run_has_called_by_the_same_name(hold: str, tmp_path: Path) -> None:
    """A layer stays in a worker from run to run, and heads are the servers' word; what is hashed for a secure sum is what this run sent."""
    base = nn.Linear(6, 6, bias=False)
    part, x, head = FrozenPart(base, hold), torch.randn(3, 6, generator=torch_generator(0, "x")), "a" * 32
    for number, left in enumerate((torch.ones(6, 1), torch.full((6, 1), -2.0)), start=1):
        bundle = FrozenBundle(ROOT, head, State({Name("x", "U@1"): left, Name("x", "V@1"): torch.ones(1, 6)}))
        run = f"{number:032x}"
        held = FrozenCache(tmp_path, as_factors=hold == "auto", owner=run).take(bundle, head, run, back=KEEP)
        part.set(held.residuals["x"])
        with torch.no_grad():
            assert torch.allclose(part(x), x @ (part.pristine + left @ torch.ones(1, 6)).T, atol=1e-5)
