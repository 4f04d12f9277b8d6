"""Nested Fed-SB: every entry of R is the mean of those who hold it, and nobody moves what it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State
from tests.strategies.federations import Exchange, Federation, classification, federate

Run = Callable[..., Federation]
OF = {"client-0": 1, "client-1": 2, "client-2": 3, "client-3": 1, "client-4": 2}
SEVERAL = "federation.ranks=[1,2,3]"


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))

    def federated(*more: str, method: str = "nested_fed_sb") -> Federation:
        schedule = ("federation.num_rounds=4", "federation.fraction=0.6", "federation.partition.sizes=[9,8,7,6,5]", "train.lr=0.02")
        given = (f"method={method}", "init.kind=orthogonal", "adapter.alpha=5", *schedule, *more)
        return federate([*classification(tiny_bert, tiny_csv), *given])

    return federated


def core(federation: Federation, exchange: Exchange, rank: int, name: Name) -> Tensor:
    layouts = federation.prepared.adapted.layouts.at(rank)
    return exchange.answer.state(layouts.up_in(exchange.instruction.round))[name].double()


@pytest.mark.parametrize("more", [(), ("federation.wire_dtype=bfloat16",), ("train.weight_decay=0.1", "federation.weighting=uniform")])
def test_at_one_rank_it_is_fed_sb_to_the_bit(run: Run, more: tuple[str, ...]) -> None:
    plain = run(*more, method="fed_sb")
    for nested in (run(*more), run(*more, "federation.ranks=[3]")):
        assert nested.sha256 == plain.sha256
        assert nested.payload() == plain.payload()
        for mine, theirs in zip(nested.records, plain.records, strict=True):
            assert (mine.exactness_gap, mine.held_gap, mine.metrics) == (theirs.exactness_gap, theirs.held_gap, theirs.metrics)
            assert mine.extras == theirs.extras  # no lifted gap: there is one rank


def test_a_round_is_the_mean_of_the_products_ring_by_ring(run: Run) -> None:
    """Densely in float64 from the uploads: each ring's products, all else of them at zero; the gap to the mean of the clients' weights,
    in which a client of a smaller rank has nothing further out; and the distance to the lifted mean."""
    federation = run(SEVERAL)
    basis, shapes, s = federation.frozen.view().basis, federation.prepared.adapted.shapes, federation.prepared.adapted.scale
    assert s == pytest.approx(5 / 3)
    for number, exchanges in federation.grid.rounds().items():
        before, after = federation.kept.states[number - 1 : number + 1]
        apart = whole = missed = trained = 0.0
        for module, shape in shapes.items():
            name = Name(module, "R")
            b, a = basis[Name(module, "B")].double(), basis[Name(module, "A")].double()
            held, lifted, mean = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
            weights = {e.instruction.client: float(e.answer.num_examples) for e in exchanges}
            for ring in (1, 2, 3):
                mask = torch.zeros(3, 3, dtype=torch.float64)
                mask[:ring, :ring] = 1
                mask[: ring - 1, : ring - 1] = 0
                holders = [e for e in exchanges if OF[e.instruction.client] >= ring]
                held += 0 if holders else s * b @ (mask * before[name].double()) @ a
                for e in holders:
                    padded, rank = torch.zeros(3, 3, dtype=torch.float64), OF[e.instruction.client]
                    padded[:rank, :rank] = core(federation, e, rank, name)
                    share = weights[e.instruction.client] / sum(weights[other.instruction.client] for other in holders)
                    held += share * s * b @ (mask * padded) @ a
            for e in exchanges:
                filled, rank = before[name].double().clone(), OF[e.instruction.client]
                filled[:rank, :rank] = core(federation, e, rank, name)
                share = weights[e.instruction.client] / sum(weights.values())
                lifted += share * s * b @ filled @ a
                mean += share * s * b[:, :rank] @ filled[:rank, :rank] @ a[:rank]
            found = s * b @ after[name].double() @ a
            assert float((found - held).norm()) <= 1e-6 * float(held.norm())
            missed, trained = missed + float((found - mean).square().sum()), trained + float(mean.square().sum())
            apart, whole = apart + float((held - lifted).square().sum()), whole + float(lifted.square().sum())
        trained += sum(float((t - federation.kept.states[0][n]).square().sum()) for n, t in after.pick(HEAD).items())
        record = federation.records[number]
        assert record.exactness_gap == pytest.approx((missed / trained) ** 0.5, rel=1e-4)
        assert record.extras["lifted_gap"] == pytest.approx((apart / whole) ** 0.5, rel=1e-4, abs=1e-7)
    assert max(record.extras["lifted_gap"] for record in federation.records[1:]) > 1e-2
    assert not federation.prepared.strategy.is_exact


def test_a_client_is_sent_its_block_of_what_the_server_holds(run: Run) -> None:
    federation = run(SEVERAL)
    for number, exchanges in federation.grid.rounds().items():
        sent = federation.kept.states[number - 1]
        for e in exchanges:
            rank = OF[e.instruction.client]
            got = e.instruction.state(federation.prepared.adapted.layouts.at(rank).down)
            assert all(torch.equal(t, sent[n] if n.role == HEAD else sent[n][:rank, :rank]) for n, t in got.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nobody_moves_what_nobody_holds(run: Run, dtype: str) -> None:
    """Weight decay, too, stays in the blocks that are there; and what is not there keeps its bits."""
    more = ("federation.ranks=[1,1,2,1,3]", "train.weight_decay=0.5", "federation.num_rounds=8", f"federation.wire_dtype={dtype}")
    federation = run(*more)
    ranks = [1, 1, 2, 1, 3]
    kept = 0
    for number, exchanges in federation.grid.rounds().items():
        most = max(ranks[int(e.instruction.client.removeprefix("client-"))] for e in exchanges)
        before, after = (state.pick("R") for state in federation.kept.states[number - 1 : number + 1])
        for name, t in after.items():
            assert not torch.equal(t[:most, :most], before[name][:most, :most])
            outside = torch.ones(3, 3, dtype=torch.bool)
            outside[:most, :most] = False
            assert torch.equal(t[outside], before[name][outside])
            kept += bool(before[name][outside].any())
    assert kept


def test_privacy_of_whole_clients_is_refused_and_why(run: Run) -> None:
    for more in ((), (SEVERAL,)):
        with pytest.raises(
            UserError, match=r"^privacy\.unit=client is not defined for method=nested_fed_sb: [^\n]* over a fixed number of"
        ):
            run("privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform", *more)


def test_a_state_without_a_head_has_its_mean_too(run: Run, tiny_llama: Path, tiny_csv: Path) -> None:
    given = ("method=nested_fed_sb", "init.kind=weight_svd", SEVERAL, "federation.num_rounds=1", "data.task=causal_lm", "data.label=null")
    federation = federate([*classification(tiny_llama, tiny_csv), *given])
    assert not State(federation.kept.states[-1]).pick(HEAD)
    assert federation.records[1].exactness_gap is not None
    assert 1e-2 < federation.records[1].exactness_gap < 10
