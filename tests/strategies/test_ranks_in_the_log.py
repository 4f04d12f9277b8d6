"""Clients of several ranks with families whose factors lie in the log: each holds, and is sent, its block of them, under the same heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from shlex import join
from shutil import rmtree
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedsb.app.frozen_stores import forget_stores
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.blocks import WHOLE, BlockMean, Sight
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State
from fedsb.cost.table import cost_of
from fedsb.run.resuming import resumed
from fedsb.server_app import serve
from fedsb.wire.frozen import ROOT, FrozenBundle, FrozenLog
from fedsb.wire.frozen_cache import FrozenCache
from fedsb.wire.messages import decode_instruction
from strategies import STRATEGIES, LowRankStrategy
from strategies.reducers import Aggregate, Reducer
from tests.run.mortal import Killed, Mortal
from tests.strategies.federations import ClientCall, Exchange, Federation, classification, federate, start_of
from tests.strategies.private_runs import EXAMPLE, small
from tests.strategies.rounds import FAMILIES, METHODS

RANKS = {f"client-{i}": 1 + i % 3 for i in range(5)}
SEVERAL = (
    "federation.ranks=[1,2,3]",
    "federation.num_rounds=5",
    "federation.fraction=0.6",
    "federation.partition.sizes=[9,8,7,6,5]",
    "train.lr=0.02",
)
# A rule for several ranks of a method's own, which has tests of its own, would stand in for that of these tests; and a pair of ranks has
# no part that is of rank 1.
WITH_RANKS = [name for name in METHODS if FAMILIES[name].in_log and FAMILIES[name].is_chain and not STRATEGIES[name].any_rank]


class Holders:
    """The mean of each entry over those who hold it."""

    def begin(self, current: State) -> None:
        self._current, self._mean = current, BlockMean()

    def add(self, upload: State, weight: float) -> None:
        self._mean.add(upload, weight)

    def finish(self) -> Aggregate:
        return Aggregate(self._mean.mean(self._current))


class OfAnyRank(LowRankStrategy):
    """A method of the tests' own, for any family."""

    any_rank = True

    def over_uploads(self) -> Reducer:
        return Holders()


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the families' methods take clients of any rank, and start from an empty home."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    for method in WITH_RANKS:
        monkeypatch.setitem(STRATEGIES, method, OfAnyRank)


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path) -> Callable[..., Federation]:
    def federated(method: str, *more: str, app: ClientCall = client_app) -> Federation:
        return federate([*classification(tiny_bert, tiny_csv), f"method={method}", start_of(method), *SEVERAL, *more], app=app)

    return federated


def moved(federation: Federation) -> tuple[str, tuple[int, int, int]]:
    assert not any(record.failed for record in federation.records)
    return federation.sha256, federation.payload()


def leading(federation: Federation, name: Name, rank: int) -> tuple[slice, ...]:
    """Return the place of a factor of a rank, from the family's shapes alone."""
    adapted = federation.prepared.adapted
    return tuple(slice(size) for size in adapted.spec.shapes(*adapted.shapes[name.module], rank)[name.role])


@pytest.mark.parametrize("method", WITH_RANKS)
def test_every_bundle_holds_the_blocks_of_the_servers_log(run: Callable[..., Federation], method: str, tmp_path: Path) -> None:
    """Put together from the first to the last, by client, they are what the server holds, cut; the bytes are those of the blocks."""
    more = ("federation.evaluate_clients=true", "data.client_test_fraction=0.3", "eval.every=2")
    federation = run(method, *more)
    cost = cost_of(federation.config)
    assert moved(federation)[1] == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    once = recurring = 0
    latest: dict[tuple[str, str], dict[Name, torch.Tensor]] = {}
    for exchange in federation.grid.exchanges:
        held = latest.setdefault((exchange.instruction.client, "held"), {})
        bundle = exchange.instruction.bundle
        for name, tensor in bundle.state.items() if bundle else ():
            role, version = name.role.split("@")
            plain = Name(name.module, role)
            assert tensor.shape == tuple(s.stop for s in leading(federation, plain, RANKS[exchange.instruction.client]))
            held[plain] = tensor
            if federation.frozen.first[plain] == int(version):
                once += tensor.numel()
            else:
                recurring += tensor.numel()
        held_at(federation, exchange, held)
    assert federation.payload()[2] == 4 * once
    assert (recurring > 0) is (FAMILIES[method].turns > 1)


def held_at(federation: Federation, exchange: Exchange, held: dict[Name, torch.Tensor]) -> None:
    """Hold what a client has against the server's log, where that is still at the same head."""
    if exchange.instruction.frozen != federation.frozen.head:
        return
    whole = federation.frozen.view().basis
    assert held.keys() == whole.keys()
    rank = RANKS[exchange.instruction.client]
    assert all(torch.equal(t, whole[name][leading(federation, name, rank)]) for name, t in held.items())


def test_the_one_off_of_a_rank_is_that_of_its_shapes(run: Callable[..., Federation]) -> None:
    federation = run("fed_sb", "federation.fraction=1.0", "federation.num_rounds=1")
    spec, shapes = federation.prepared.adapted.spec, federation.prepared.adapted.shapes.values()
    each = [sum(prod(spec.shapes(m, n, rank)[role]) for m, n in shapes for role in "BA") for rank in RANKS.values()]
    assert federation.payload()[2] == 4 * sum(each)
    assert cost_of(federation.config).one_off == sum(each) // 5


def by_client(folder: Path, clear: Callable[[str, int], bool] = lambda client, number: False) -> ClientCall:
    """Return the ClientApp of clients with a home each, which is emptied before some rounds, and no memory between two messages."""

    def call(message: Message, context: Context) -> Message:
        forget_stores()
        if message.metadata.message_type.startswith("query."):
            return client_app(message, context)
        instruction = decode_instruction(message.content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FEDSB_HOME", str(folder / instruction.client))
            if clear(instruction.client, instruction.round):
                rmtree(folder / instruction.client, ignore_errors=True)
            return client_app(message, context)

    return call


def fresh(message: Message, context: Context) -> Message:
    """Answer as a process does that has just begun."""
    forget_stores()
    return client_app(message, context)


@pytest.mark.parametrize("method", WITH_RANKS)
def test_a_cache_that_clients_of_several_ranks_share_mixes_none(run: Callable[..., Federation], method: str, tmp_path: Path) -> None:
    """One process, one after the other, and fresh ones, all over one folder, end as clients do that have a folder each."""
    apart = moved(run(method, app=by_client(tmp_path / "homes")))
    assert moved(run(method)) == apart
    rmtree(tmp_path / "home" / "frozen")
    assert moved(run(method, app=fresh)) == apart


@pytest.mark.parametrize("method", WITH_RANKS)
def test_every_head_has_a_file_for_each_rank(run: Callable[..., Federation], method: str, tmp_path: Path) -> None:
    federation = run(method, "federation.fraction=1.0")
    folder, family = tmp_path / "home" / "frozen", FAMILIES[method]
    # What the last round has moved nobody was sent any more.
    rested = [role for role in family.in_log if role not in family.learn(federation.config.federation.num_rounds)]
    whole, head = federation.frozen.view().basis.pick(*rested), federation.grid.exchanges[-1].instruction.frozen
    for rank in (1, 2, 3):
        basis = FrozenCache(folder, rank, as_factors=True).load(head).basis
        assert all(torch.equal(basis[name], t[leading(federation, name, rank)]) for name, t in whole.items())
    assert not list(folder.glob(f"{head}.safetensors"))
    plain = run(method, "federation.ranks=null", f"federation.num_rounds={family.turns}")
    head = plain.grid.exchanges[-1].instruction.frozen
    basis = FrozenCache(folder, as_factors=True).load(head).basis
    assert {name: t.shape for name, t in basis.items()} == {name: t.shape for name, t in plain.frozen.view().basis.items()}


@pytest.mark.parametrize("method", WITH_RANKS)
def test_a_lost_cache_is_sent_all_of_its_rank(run: Callable[..., Federation], method: str, tmp_path: Path) -> None:
    more = ("federation.fraction=1.0", "federation.num_rounds=3")
    kept = run(method, *more, app=by_client(tmp_path / "kept"))
    lost = run(method, *more, app=by_client(tmp_path / "lost", lambda client, number: (client, number) == ("client-1", 3)))
    assert lost.sha256 == kept.sha256
    [first, *again] = [e for e in lost.grid.rounds()[3] if e.instruction.client == "client-1"]
    if first.instruction.bundle is not None and first.instruction.bundle.parent == ROOT:
        assert not again
        return
    assert (first.answer.missing, [e.answer.missing for e in again]) == (True, [False])
    bundle = again[0].instruction.bundle
    assert bundle is not None
    state = lost.prepared.strategy.layouts.at(2).down.numel
    more_bytes = [a - b for a, b in zip(lost.payload(), kept.payload(), strict=True)]
    assert more_bytes[0] == 0
    assert sum(more_bytes) == 4 * (state + bundle.state.numel)
    assert bundle.state.numel == lost.prepared.strategy.layouts.at(2).log.numel


def served(folder: Path, overrides: Sequence[str], life: int = 10**9) -> dict[str, Any]:
    config = resumed(load(list(overrides)), list(overrides))
    grid = Mortal.simulation(client_app, {"overrides": join(overrides), "output": str(folder)})
    grid.life, grid.after = life, True
    return serve(config, grid, folder)


@pytest.mark.parametrize("method", ["fed_sb", "rolora"])
def test_a_run_killed_and_resumed_ends_with_the_same_bits(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    given = ("federation.num_rounds=4", "federation.ranks=[1,2]", "federation.fraction=0.75", f"method={method}", start_of(method))
    overrides = small(tiny_bert, tmp_path, *given)
    whole, folder = served(tmp_path / "whole", overrides), tmp_path / "killed"
    with pytest.raises(Killed):
        served(folder, overrides, life=7)
    forget_stores()
    again = served(folder, [f"resume={folder}"])
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}


@pytest.mark.parametrize("method", ["fed_sb"])
def test_clients_of_one_rank_train_side_by_side(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    """In groups; all of them are as if each were alone, and so are private ones, whose noise has their own shapes."""
    from tests.runtime.test_stacked_runs import alike
    from tests.runtime.test_stacked_runs import federate as stacked

    for unit in ((), EXAMPLE):
        given = ("federation.ranks=[1,1,2,2]", *unit, f"method={method}", start_of(method))
        overrides = small(tiny_bert, tmp_path, *given)
        alone, together = (stacked(tmp_path / f"{len(unit)}-{k}", [*overrides, f"runtime.stack={k}"]) for k in (1, 4))
        for key in set(alone) - {"wall_s", "cpu_s", "factors_sha256", "exactness_gap", "held_gap"}:
            assert alike(together[key], alone[key]), key


def test_a_rank_above_a_side_of_a_module_is_refused(run: Callable[..., Federation]) -> None:
    with pytest.raises(UserError, match=r"^rank \(33\) exceeds min\(out, in\) = 32 of '[^\n]*; lower rank or drop it"):
        run("fed_sb", "rank=33", "federation.ranks=[1,33]")


def test_what_nobody_sees_cut_is_put_together_once_for_all_ranks(run: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch) -> None:
    """What FLoRA adds to the frozen weights outweighs all else that is sent; of Fed-SB's factors each rank has its own block."""
    made: list[FrozenBundle] = []
    bundle = FrozenLog.bundle

    def kept(log: FrozenLog, since: int, sight: Sight = WHOLE) -> FrozenBundle | None:
        found = bundle(log, since, sight)
        made.extend([found] if found else [])
        return found

    monkeypatch.setattr(FrozenLog, "bundle", kept)
    for method, each in (("flora", 1), ("nested_fed_sb", len(set(RANKS.values())))):
        made.clear()
        federation = run(method, "federation.num_rounds=2", "seed=3")
        heads = {made_one.head for made_one in made}
        assert len(federation.grid.rounds()) == 2
        assert len(made) == each * len(heads) > 0
