"""LoRA-One: where it starts, what that costs, and that the step is in everybody's model once."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch

from fedsb.adapters import SPECS
from fedsb.adapters.families.lora import one_step
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.cost.table import cost_of
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.private_runs import EXAMPLE, run_privately, small

Run = Callable[..., Federation]
ROUNDS = ["federation.num_rounds=2", "init.num_examples=8", "train.lr=0.02"]


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return lambda *more: federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *more])


def test_the_pair_is_one_step_of_rank_r_down_the_gradient_whatever_its_size() -> None:
    gradient = torch.randn(9, 12, generator=torch_generator(0, "test"), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(gradient)
    for size in (1.0, 1e4):
        found = State({Name("x", "B"): u[:, :4], Name("x", "S"): size * s[:4], Name("x", "A"): vt[:4]})
        pair = one_step(found, "zero", 0.01, 5.0, gamma=16.0)
        wanted = -(u[:, :4] * s[:4]) @ vt[:4] / (16.0 * s[0])
        torch.testing.assert_close(pair[Name("x", "B")] @ pair[Name("x", "A")], wanted)
        torch.testing.assert_close(pair[Name("x", "B")].norm(), pair[Name("x", "A")].norm())  # balanced


def test_frozen_the_pair_has_its_step_in_the_core() -> None:
    gradient = torch.randn(9, 12, generator=torch_generator(0, "test"), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(gradient)
    found = State({Name("x", "B"): u[:, :4], Name("x", "S"): s[:4], Name("x", "A"): vt[:4]})
    made = SPECS["lora_sb"].having({"gamma": 16.0}).from_gradient(found, "zero", 0.01, 5.0)
    b, r, a = (made[Name("x", role)].double() for role in "BRA")
    torch.testing.assert_close(b @ r @ a, -(u[:, :4] * s[:4]) @ vt[:4] / (16.0 * s[0]))
    torch.testing.assert_close(r, torch.eye(4, dtype=torch.float64) / 16.0)
    torch.testing.assert_close(b.norm(dim=0), (s[:4] / s[0]).sqrt())


def test_fed_sb_between_it_is_exact(run: Run) -> None:
    federation = run("method=fed_sb", "adapter.options.gamma=128", "init.kind=gradient")
    assert max(record.exactness_gap or 0 for record in federation.records[1:]) < 1e-5
    core = next(t for name, t in federation.kept.states[0].items() if name.role == "R")
    assert torch.equal(core, torch.eye(len(core)) / 128)


def test_a_layer_without_a_gradient_starts_at_w0() -> None:
    found = State({Name("x", "B"): torch.eye(4)[:, :2], Name("x", "S"): torch.zeros(2), Name("x", "A"): torch.eye(4)[:2]})
    assert not any(t.any() for t in one_step(found, "zero", 0.01, 1.0).values())


def test_s_is_in_the_step_and_all_start_from_it(run: Run) -> None:
    federation = run("method=lora_one")
    adapted, first = federation.prepared.adapted, federation.kept.states[0]
    assert adapted.scale == pytest.approx(16 / sqrt(3))
    for module in adapted.shapes:
        b, a = (first[Name(module, role)].double() for role in "BA")
        assert float(torch.linalg.matrix_norm(b @ a, 2)) == pytest.approx(1 / 128, rel=1e-4)  # S_1 / (γ S_1)
    assert federation.records[0].payload_one_off > 0
    cost = cost_of(federation.config)
    assert federation.payload() == (cost.payload_up, cost.payload_down, cost.payload_one_off)
    assert all(record.exactness_gap for record in federation.records[1:])


def test_the_start_lowers_the_loss(run: Run) -> None:
    started, plain = run("method=lora_one", "adapter.options.gamma=4"), run("method=fedavg_lora")
    assert started.records[0].metrics["loss"] < plain.records[0].metrics["loss"]


def test_other_rules_over_loras_factors_start_so_too(run: Run) -> None:
    federation = run("method=fedex_lora", "init.kind=gradient")
    assert max(record.exactness_gap or 0 for record in federation.records[1:]) < 1e-5
    assert any(t.any() for name, t in federation.kept.states[0].items() if name.role == "B")


def test_a_private_round_is_preconditioned_after_the_noise(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, "method=lora_one", "init.kind=random", "train.preconditioner=riemannian")
    run = run_privately(overrides, tmp_path / "run")
    assert run.error is None
    assert run.claim.final(simulated=True)["max"] > 0


@pytest.mark.parametrize("gamma", ["0", "-1"])
@pytest.mark.parametrize("family", ["lora", "lora_one", "lora_sb"])
def test_no_step_is_refused(family: str, gamma: str) -> None:
    with pytest.raises(UserError, match=rf"^adapter\.options\.gamma={gamma} is out of range; it must be above 0"):
        SPECS[family].having(load(["method=lora_one", f"adapter.options.gamma={gamma}"]).adapter.options)
