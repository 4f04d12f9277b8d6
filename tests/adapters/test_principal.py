"""Starts that are a part of W0: what they are, that the run begins at W0 with them, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsb.adapters.principal import olora, pissa
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.cost.table import cost_of
from strategies.carried import remember
from tests.strategies.federations import Federation, classification, federate

Run = Callable[..., Federation]
WEIGHT = torch.randn(20, 30, generator=torch_generator(0, "test"))
SHORT = ["federation.num_rounds=2", "train.lr=0.02", "adapter.alpha=5"]


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return lambda *more: federate([*classification(tiny_bert, tiny_csv), *SHORT, *more])


def test_pissa_is_the_leading_part_in_two_halves_of_one_size() -> None:
    made = pissa({"x": WEIGHT}, 4, 0)
    b, a = (made[Name("x", role)].double() for role in "BA")
    u, s, vt = torch.linalg.svd(WEIGHT.double())
    torch.testing.assert_close(b @ a, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_olora_is_the_first_part_of_qr(shape: tuple[int, int]) -> None:
    weight = WEIGHT.reshape(shape)
    made = olora({"x": weight}, 4, 0)
    b, a = (made[Name("x", role)].double() for role in "BA")
    torch.testing.assert_close(b.T @ b, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close((b @ a)[:, :4], weight.double()[:, :4], atol=1e-5, rtol=1e-5)  # R is triangular


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("method", ["fedavg_lora", "fedex_lora"])
def test_the_run_begins_at_w0_and_its_pair_is_not_zero(run: Run, method: str, kind: str) -> None:
    started, plain = run(f"method={method}", f"init.kind={kind}"), run(f"method={method}")
    for key, value in plain.records[0].metrics.items():
        assert started.records[0].metrics[key] == pytest.approx(value, rel=1e-4)
    assert all(t.any() for t in started.kept.states[0].pick("A", "B").values())
    cost = cost_of(started.config)
    assert started.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert started.payload()[1] > plain.payload()[1]


def test_frlora_hands_one_pair_out_and_adds_what_its_product_has_moved(run: Run) -> None:
    federation = run("method=frlora")
    states, scale = federation.kept.states, federation.prepared.adapted.scale
    for name, t in states[0].pick("A", "B").items():
        assert all(torch.equal(t, state[name]) for state in states[1:])
    one = run("method=frlora", "federation.num_rounds=1")
    exchanges, added = one.grid.rounds()[1], one.frozen.view().residuals
    uploads = [e.answer.state(federation.prepared.adapted.layouts.up_in(1)) for e in exchanges]
    weights = torch.tensor([float(e.answer.num_examples) for e in exchanges], dtype=torch.float64)
    assert {*added} == {*federation.prepared.adapted.shapes}
    for module, found in added.items():
        b, a = (
            sum(w * upload[Name(module, role)].double() for w, upload in zip(weights / weights.sum(), uploads, strict=True))
            for role in "BA"
        )
        b0, a0 = (states[0][Name(module, role)].double() for role in "BA")
        moved = scale * (b @ a - b0 @ a0)
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(found.matrix().double() + scale * b0 @ a0, moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["fedavg_lora", "frlora"])
def test_what_pissa_takes_out_of_w0_is_its_leading_part_whatever_s_is(run: Run, method: str) -> None:
    """Unscaled, s = 5 / 3 would leave the leading part in the frozen weights, turned round."""
    federation = run(f"method={method}", "init.kind=pissa", "federation.num_rounds=1")
    adapted, first = federation.prepared.adapted, federation.kept.states[0]
    assert adapted.scale == pytest.approx(5 / 3)
    for module, weight in adapted.weights().items():
        b, a = (first[Name(module, role)].double() for role in "BA")
        u, s, vt = torch.linalg.svd(weight.double())
        torch.testing.assert_close(adapted.scale * b @ a, (u[:, : len(a)] * s[: len(a)]) @ vt[: len(a)], atol=1e-5, rtol=1e-4)


def test_what_has_not_moved_adds_nothing_to_the_weights_to_the_bit(run: Run) -> None:
    strategy = run("method=frlora", "federation.num_rounds=1").prepared.strategy
    held = State({Name("x", "B"): 1e3 * WEIGHT[:, :4], Name("x", "A"): 1e3 * WEIGHT[:4]})
    added = strategy.follow(held.map(torch.Tensor.double), held).log
    assert not (added[Name("x", "U")] @ added[Name("x", "V")]).any()


def test_frlora_with_one_client_is_exact(run: Run) -> None:
    one = ["federation.num_clients=1", "federation.partition.kind=iid", "federation.partition.sizes=null"]
    assert max(record.exactness_gap or 0 for record in run("method=frlora", *one).records[1:]) < 1e-5


def test_the_gap_is_measured_against_what_was_learnt_and_a_checkpoint_has_the_start(run: Run) -> None:
    federation = run("method=frlora", "adapter.alpha=30")
    strategy, first = federation.prepared.strategy, federation.kept.states[0]
    exchanges = federation.grid.rounds()[1]
    uploads = [e.answer.state(federation.prepared.adapted.layouts.up_in(1)) for e in exchanges]
    weights = torch.tensor([float(e.answer.num_examples) for e in exchanges], dtype=torch.float64)
    missed = learnt = 0.0
    for module in federation.prepared.adapted.shapes:
        pairs = [tuple(each[Name(module, role)].double() for role in "BA") for each in (*uploads, first)]
        start = pairs.pop()
        mean = sum(w * b @ a for w, (b, a) in zip(weights / weights.sum(), pairs, strict=True))
        b, a = (sum(w * pair[i] for w, pair in zip(weights / weights.sum(), pairs, strict=True)) for i in range(2))
        missed += float((10 * (b @ a - mean)).square().sum())
        learnt += float((10 * (mean - start[0] @ start[1])).square().sum())
    learnt += sum(float((federation.kept.states[1][name] - t).double().square().sum()) for name, t in first.pick("head").items())
    assert federation.records[1].exactness_gap == pytest.approx((missed / learnt) ** 0.5, rel=1e-4)
    assert {name.role for name in remember(strategy).states["first-head"]} == {"U", "V", "head"}


@pytest.mark.parametrize(("method", "whole"), [("florist", "null"), ("flexlora", "1"), ("fedmomentum", "1")])
def test_no_share_of_w0_is_cut_off(method: str, whole: str) -> None:
    given = [f"method={method}", "init.kind=pissa"]
    with pytest.raises(
        UserError, match=r"^method\.options\.energy=0\.8 with init\.kind=pissa: .* set method\.options\.energy=null, or init"
    ):
        load([*given, "method.options.energy=0.8"])
    load([*given, f"method.options.energy={whole}"])


def test_ranks_of_their_own_would_not_put_all_of_it_back() -> None:
    with pytest.raises(
        UserError, match=r"^init\.kind=pissa with federation\.ranks=\[2, 4\]: .* use init\.kind=random, or federation\.ranks=null$"
    ):
        load(["method=flexlora", "init.kind=pissa", "federation.ranks=[2,4]"])
