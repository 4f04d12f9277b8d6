"""Clients that prune themselves: what presses their tails down, when their ranks fall, and what travels from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fedsb.adapters.tails import kept_rank, tail_norm
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.cost.table import cost_of
from fedsb.models.preconditioning import before_steps
from strategies.carried import remember
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small

PRUNE = ["method=hetlora", "method.options.prune=0.6", "train.tail_penalty=50", "init.kind=gradient", "init.num_examples=8"]


@pytest.fixture
def pruned(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    base = [each for each in classification(tiny_bert, tiny_csv) if each != "rank=3"]
    # Tails that weigh more than the steps of an optimiser, which would overshoot zero.
    return federate(
        [*base, *PRUNE, "rank=5", "adapter.options.gamma=1", "federation.num_rounds=6", "train.lr=0.002", "federation.fraction=0.6"]
    )


def factors(dtype: torch.dtype = torch.float64) -> dict[Name, nn.Parameter]:
    draw = torch_generator(0, "tails")
    shapes = {("x", "B"): (7, 5), ("x", "A"): (5, 6), ("y", "B"): (4, 5), ("y", "A"): (5, 9), ("c", "head"): (3,)}
    return {Name(*name): nn.Parameter(torch.randn(shape, generator=draw, dtype=dtype)) for name, shape in shapes.items()}


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.1, 1), (0.99, 4)])
def test_the_penalty_is_the_gradient_of_the_products_of_the_tails_norms(share: float, kept: int) -> None:
    trained = factors()
    loss = sum((trained[Name(m, "B")][:, kept:].norm() * trained[Name(m, "A")][kept:].norm() for m in "xy"), start=torch.zeros(()))
    assert kept_rank(5, share) == kept
    assert tail_norm({name: p.detach() for name, p in trained.items()}, share) == pytest.approx(loss.item())
    for p in trained.values():
        p.grad = torch.ones_like(p)
    before_steps(load(["method=hetlora", f"method.options.prune={share}", "train.tail_penalty=3"]).train, trained)()
    wanted = torch.autograd.grad(3 * loss, list(trained.values()), allow_unused=True)
    for p, gradient in zip(trained.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, torch.ones_like(p) + (0 if gradient is None else gradient))


def test_a_tail_of_zeros_stays_finite_and_a_rank_of_one_has_none() -> None:
    trained = factors(torch.float32)
    for name, p in trained.items():
        p.data.mul_(name.role == "A")
        p.grad = torch.zeros_like(p)
    train = load(["method=hetlora", "method.options.prune=0.5", "train.tail_penalty=3"]).train
    before_steps(train, trained)()
    assert not any(p.grad.any() for p in trained.values() if p.grad is not None)
    assert tail_norm(State({Name("x", "B"): torch.ones(3, 1), Name("x", "A"): torch.ones(1, 4)}), 0.5) == 0


def test_ranks_fall_where_tails_have_lost_weight_and_the_bytes_with_them(pruned: Federation) -> None:
    strategy, layouts = pruned.prepared.strategy, pruned.prepared.adapted.layouts
    ranks = dict.fromkeys(strategy.participation.clients, 5)
    for number, exchanges in sorted(pruned.grid.rounds().items()):
        for exchange in exchanges:
            client = exchange.instruction.client
            mine = layouts.at(ranks[client])
            assert exchange.instruction.rank == (None if ranks[client] == 5 else ranks[client])
            sent, upload = exchange.instruction.state(mine.down), exchange.answer.state(mine.up_in(number))
            if tail_norm(upload, 0.6) < tail_norm(sent, 0.6):
                ranks[client] = kept_rank(ranks[client], 0.6)
        assert pruned.records[number].extras.get("lowered", 0) == sum(rank < 5 for rank in ranks.values())
    assert strategy.lowered == {client: rank for client, rank in ranks.items() if rank < 5}
    assert min(ranks.values()) == 1
    assert remember(strategy).facts["lowered"] == strategy.lowered
    cost = cost_of(pruned.config)
    assert all(moved < foretold for moved, foretold in zip(pruned.payload()[:2], (cost.payload_up, cost.payload_down), strict=True))


def test_noised_uploads_decide_as_well_and_int8_forgets_what_it_left_out_of_a_tail(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    more = ["init.kind=random", "rank=2", "federation.wire_dtype=int8", "federation.num_rounds=3", "train.lr=0.02"]
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, *PRUNE, *more)
    run = run_privately([each for each in overrides if not each.startswith("rank=") or each == "rank=2"], tmp_path / "run")
    assert run.error is None
    assert run.records[-1].extras["lowered_rank"] == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            ["method.options.prune=0.5", "init.kind=pissa"],
            r"^init\.kind=pissa with method\.options\.prune=0\.5: the whole product is taken",
        ),
        (["train.tail_penalty=1"], r"^train\.tail_penalty=1 presses down what is behind train\.tail_share of the rank, which is not given"),
        (
            ["method=fed_sb", "train.tail_penalty=1", "train.tail_share=0.5"],
            r"^train\.tail_penalty=1 is for LoRA's B and A, .* trains R; leave",
        ),
        (["method.options.prune=1.5"], r"^train\.tail_share=1\.5 is out of range; it must be between 0 and 1$"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(["method=hetlora", *given])
