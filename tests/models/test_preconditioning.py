"""What is done to gradients before a step: the formula, with and without noise, and where it is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name
from fedsb.models.fit import Site, fit
from fedsb.models.preconditioning import DELTA, preconditioner
from fedsb.tasks.task import TASKS
from tests.models.test_narrow import built, texts


def pair(rank: int = 3) -> dict[Name, nn.Parameter]:
    found = {}
    for role, shape in {"B": (7, rank), "A": (rank, 5)}.items():
        p = nn.Parameter(torch.randn(shape, generator=torch_generator(0, "test", role)))
        p.grad = torch.randn(shape, generator=torch_generator(1, "test", role))
        found[Name("x", role)] = p
    return found


def test_each_gradient_is_taken_through_the_other_factors_gram_matrix() -> None:
    trained = pair()
    b, a = (trained[Name("x", role)] for role in "BA")
    before = {name: p.grad.clone().double() for name, p in trained.items() if p.grad is not None}
    preconditioner("riemannian", trained)()
    eye = DELTA * torch.eye(3, dtype=torch.float64)
    of_b = before[Name("x", "B")] @ torch.linalg.inv(a.detach().double() @ a.detach().double().T + eye)
    of_a = torch.linalg.inv(b.detach().double().T @ b.detach().double() + eye) @ before[Name("x", "A")]
    assert b.grad is not None
    assert a.grad is not None
    torch.testing.assert_close(b.grad.double(), of_b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.grad.double(), of_a, rtol=1e-5, atol=1e-6)


def test_the_step_of_the_product_does_not_depend_on_how_it_is_split() -> None:
    """To first order in the step: what plain gradients of (B Q⁻¹, Q A) lack."""
    q = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.2, 0.5], [0.0, 0.0, 2.0]])
    g = torch.randn(7, 5, generator=torch_generator(2, "test"))
    moves = []
    for turn in (torch.eye(3), q):
        trained = pair()
        b, a = (trained[Name("x", role)] for role in "BA")
        with torch.no_grad():
            b.copy_(b @ torch.linalg.inv(turn))
            a.copy_(turn @ a)
        b.grad, a.grad = g @ a.detach().T, b.detach().T @ g
        preconditioner("riemannian", trained)()
        moves.append(b.grad @ a.detach() + b.detach() @ a.grad)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-4)


def test_nothing_is_done_unless_asked_and_a_head_is_left_alone() -> None:
    trained = pair() | {Name("head", "head"): nn.Parameter(torch.ones(2))}
    trained[Name("head", "head")].grad = torch.full((2,), 3.0)
    before = [p.grad.clone() for p in trained.values() if p.grad is not None]
    preconditioner("none", trained)()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, trained.values(), strict=True) if p.grad is not None)
    preconditioner("riemannian", trained)()
    assert torch.equal(trained[Name("head", "head")].grad, before[-1])  # type: ignore[arg-type]


def test_a_round_of_training_takes_it_before_the_optimiser(tiny_bert: Path) -> None:
    """One step of SGD: what the plain one moved, through the other factor's Gram matrix."""
    train = load(["train.optimizer=sgd", "train.momentum=0", "train.weight_decay=0", "train.lr=1", "train.local_steps=1"]).train
    train, ends = replace(train, batch_size=9, clip_norm=None, schedule="constant"), []
    begun = built(tiny_bert, "classification", "lora", dtype="float32").copied("B", "A")
    for kind in ("none", "riemannian"):
        adapted = built(tiny_bert, "classification", "lora", dtype="float32")
        fit(adapted, TASKS["classification"], texts(), train=replace(train, preconditioner=kind), site=Site(0, "client-0", 1, 1))
        end = adapted.copied("B", "A")
        ends.append({name: t.double() - begun[name].double() for name, t in end.items()})
    plain, taken = ends
    assert all(torch.equal(t, taken[name]) for name, t in plain.items() if name.role == "head")
    off = whole = apart = 0.0
    for name, moved in plain.items():
        if name.role == "B":
            a = begun[Name(name.module, "A")].double()
            wanted = moved @ torch.linalg.inv(a @ a.T + DELTA * torch.eye(len(a), dtype=torch.float64))
            off, whole = off + float((taken[name] - wanted).square().sum()), whole + float(wanted.square().sum())
            apart += float((taken[name] - moved).square().sum())
    assert off <= 1e-6 * whole
    assert apart > 0.01 * whole > 0


@pytest.mark.parametrize("method", ["fed_sb", "rolora", "ffa_lora", "head_only", "abba"])
def test_a_method_without_the_pair_is_refused(method: str) -> None:
    with pytest.raises(
        UserError, match=rf"^train\.preconditioner=riemannian is for LoRA's B and A, .* method '{method}' trains .*; leave it out$"
    ):
        load([f"method={method}", "train.preconditioner=riemannian"])


def test_noise_is_not_taken_through_a_zero_without_an_optimiser_that_normalises() -> None:
    """Such a run ended at a self-check, at factors near the end of float32."""
    given = ["method=fedavg_lora", "privacy=example", "privacy.epsilon=3", "train.preconditioner=riemannian", "train.optimizer=sgd"]
    with pytest.raises(UserError, match=r"^train\.preconditioner=riemannian with train\.optimizer=sgd, .*random: B begins at zero"):
        load(given)
    load([*given[:-1], "train.optimizer=adamw"])
    load([*given, "init.kind=pissa"])
