"""FLoRIST sends of each module the components that its energy keeps, and no others; clients hold what the server does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedsb.adapters.redrawn import Redrawn
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State
from fedsb.cost.table import cost_of
from fedsb.wire.arrays import LayoutError
from fedsb.wire.messages import Instruction
from fedsb.wire.short_states import received
from tests.strategies.federations import Federation, classification, federate, mean_update
from tests.strategies.rounds import Options

A, B = Name("m", "A"), Name("m", "B")
DRAWN = Redrawn(seed=3, round=2)


def state(kept: int, rank: int = 4) -> State:
    """Return factors of which the leading components were trained and the others are as they are drawn."""
    draw = torch_generator(0, "kept")
    a, b = torch.randn(rank, 6, generator=draw), torch.randn(9, rank, generator=draw)
    a[kept:], b[:, kept:] = DRAWN.rows("m", (rank, 6))[kept:], 0
    return State({A: a, B: b})


def ranks_by_energy(federation: Federation, number: int, share: float) -> dict[str, int]:
    """Return the least rank of each module's dense mean product that keeps a share of its energy, at most the run's."""
    exchanges, most = federation.grid.rounds()[number], federation.config.adapter.rank
    update, _ = mean_update(federation, exchanges, State())
    energies = {module: torch.linalg.svdvals(dense).square() for module, dense in update.items()}
    return {
        module: min(most, 1 + int((energy.cumsum(0) < share * energy.sum()).sum())) if float(energy[0]) else 1
        for module, energy in energies.items()
    }


@pytest.fixture(
    params=[
        ["rank=3"],
        ["rank=3", "federation.wire_dtype=bfloat16"],
        ["rank=6", "federation.evaluate_clients=true", "data.client_test_fraction=0.3"],
    ],
    ids=str,
)
def run(request: pytest.FixtureRequest, options: Options) -> Federation:
    return federate(options("tiny_gpt2", "florist", "method.options.energy=0.9", *request.param))


def test_p_columns_and_rows_of_a_module_come_down(run: Federation) -> None:
    """p as a dense SVD has it; the head and the round before any training whole."""
    size, shapes = (2 if run.config.federation.wire_dtype == "bfloat16" else 4), run.prepared.adapted.shapes
    head = sum(t.numel() for name, t in run.kept.states[0].items() if name.role == HEAD)
    kept = []
    for number, exchanges in sorted(run.grid.rounds().items()):
        ranks = ranks_by_energy(run, number - 1, 0.9) if number > 1 else dict.fromkeys(shapes, run.config.adapter.rank)
        values = head + sum(p * sum(shapes[module]) for module, p in ranks.items())
        again = run.grid.rounds("evaluate").get(number, [])
        after = ranks_by_energy(run, number, 0.9)
        whole = head + sum(p * sum(shapes[module]) for module, p in after.items())
        assert run.records[number].payload_down == size * (len(exchanges) * values + len(again) * whole)
        kept += ranks.values() if number > 1 else ()
    assert 1 < sum(kept) / len(kept) < run.config.adapter.rank
    cost = cost_of(run.config)
    assert cost.at_most
    assert run.payload()[0] == cost.payload_up
    assert run.payload()[1] < cost.payload_down


def test_clients_hold_what_the_server_does(run: Federation) -> None:
    layout = run.prepared.adapted.layouts.down
    seen = 0
    for kind in ("train", "evaluate"):
        for number, exchanges in run.grid.rounds(kind).items():
            at_server = run.kept.states[number - (kind == "train")]
            for exchange in exchanges:
                held = received(exchange.instruction, layout, layout, run.config.seed)
                assert all(torch.equal(t, at_server[name]) for name, t in held.items())
                seen += 1
    assert seen >= 12


def test_a_client_of_a_smaller_rank_is_sent_its_block_of_what_is_kept(tiny_bert: Path, tiny_csv: Path) -> None:
    more = ["federation.ranks=[1,2,5]", "rank=5", "method.options.energy=0.6", "federation.num_rounds=3", "train.lr=0.05"]
    run = federate([*classification(tiny_bert, tiny_csv), "method=florist", *more])
    layouts, sent = run.prepared.adapted.layouts, set()
    for number, exchanges in run.grid.rounds().items():
        for exchange in exchanges:
            own = run.prepared.strategy.layouts_of(exchange.instruction.client)
            held = received(exchange.instruction, own.down, layouts.down, run.config.seed)
            assert Layout.of(held) == own.down
            assert all(torch.equal(t, own.sight.of(name, run.kept.states[number - 1][name])) for name, t in held.items())
            sent |= {(own.down.shapes[0][1][0], rank) for rank in exchange.instruction.ranks}
    assert {(2, 1), (2, 2), (5, 1), (5, 2)} <= sent
    assert not any(rank == 1 for rank, _ in sent)  # the least is sent whole


def test_an_int8_wire_carries_the_whole_rank(options: Options) -> None:
    run = federate(options("tiny_bert", "florist", "federation.wire_dtype=int8", "federation.num_rounds=2", "rank=4"))
    assert not any(exchange.instruction.ranks for exchange in run.grid.exchanges)
    assert run.payload()[1] == cost_of(run.config).payload_down
    assert not cost_of(run.config).at_most


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_what_was_not_changed_need_not_be_sent(kept: int) -> None:
    assert DRAWN.ranks(state(kept)) == {"m": max(1, kept)}
    assert replace(DRAWN, round=3).ranks(state(kept)) == {"m": 4}
    for role, place in ((A, (3, 5)), (B, (8, 3))):
        changed = state(kept)
        changed[role][place] += 1e-3
        assert DRAWN.ranks(changed) == {"m": 4}


@pytest.mark.parametrize("n", [1, 3, 6, 384, 768, 4096, 11008])
def test_a_drawn_row_has_norm_one_up_to_a_half_power_of_two_and_no_wire_rounds_it(n: int) -> None:
    rows = DRAWN.rows("m", (5, n))
    assert float(rows.norm(dim=1).log2().abs().max()) <= 0.5 + 1e-6
    assert torch.equal(rows.bfloat16().float(), rows)
    assert not torch.equal(rows, replace(DRAWN, seed=4).rows("m", (5, n))) or n == 1


@pytest.mark.parametrize("broken", [lambda i: replace(i, ranks=(1, 1)), lambda i: replace(i, ranks=(0,)), lambda i: replace(i, ranks=(3,))])
def test_ranks_that_cannot_be_are_an_error_of_layout(broken: Callable[[Instruction], Instruction]) -> None:
    whole = Layout.of(state(4))
    short = State({A: state(2)[A][:2], B: state(2)[B][:, :2].clone()})
    flats = {"trained": torch.cat([short[A].reshape(-1), short[B].reshape(-1)])}
    good = Instruction("a", 3, flats=flats, digest=Layout.of(short).digest, ranks=(2,), made_in=2)
    assert all(torch.equal(t, state(2)[name]) for name, t in received(good, whole, whole, 3).items())
    with pytest.raises(LayoutError):
        received(broken(good), whole, whole, 3)
