"""FedRot-LoRA: what it multiplies factors by is a rotation, the best one, and leaves every product alone; it is FedIT at strength 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import State
from strategies.methods.fedrot_lora import Aligned, partial_rotation, rotation
from strategies.reducers import PlainMean
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.uploads import HEADS, A, B, gaussian, reduce

EYE = torch.eye(4, dtype=torch.float64)


def turn(seed: int, rank: int = 4) -> Tensor:
    """Return a rotation (r, r) of determinant 1 in float64."""
    q, _ = torch.linalg.qr(gaussian(rank, rank, seed=seed).double())
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_it_is_a_rotation_and_at_full_strength_the_best_one(seed: int, strength: float) -> None:
    m = gaussian(4, 4, seed=seed)
    found = partial_rotation(m, strength)
    assert torch.allclose(found @ found.T, EYE, atol=1e-12)
    assert float(torch.linalg.det(found)) == pytest.approx(1)
    reached = [float((m.double() @ turn(100 + i)).trace()) for i in range(300)]
    assert float((m.double() @ rotation(m)).trace()) > max(reached)


@pytest.mark.parametrize("angle", [0.4, -1.2, 2.5])
def test_half_of_a_plane_rotation_is_half_its_angle(angle: float) -> None:
    def by(a: float) -> Tensor:
        return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64)

    assert torch.allclose(rotation(by(angle).T), by(angle), atol=1e-12)
    assert torch.allclose(partial_rotation(by(angle).T, 0.5), by(angle / 2), atol=1e-12)


@pytest.mark.parametrize("side", ["A", "B"])
def test_uploads_that_are_rotations_of_each_other_have_their_product_as_the_mean(side: str) -> None:
    """The mean of the factors as they come has not; and one upload alone keeps its product at any strength."""
    b, a = gaussian(9, 4, seed=1), gaussian(4, 7, seed=2)
    sent, head = State({B: b, A: a}), gaussian(3, seed=3)
    turned = [State({B: (b.double() @ q).float(), A: (q.T @ a.double()).float(), HEADS: head}) for q in map(turn, (5, 6, 7))]
    product, weights = b.double() @ a.double(), [3.0, 1.0, 2.0]
    found, plain = reduce(Aligned(side, 1.0), turned, weights, sent), reduce(PlainMean(), turned, weights)
    assert float((found.state[B] @ found.state[A] - product).norm() / product.norm()) < 1e-6
    assert float((plain.state[B] @ plain.state[A] - product).norm() / product.norm()) > 0.1
    assert torch.allclose(found.state[HEADS], plain.state[HEADS], atol=0)
    assert 0.1 < found.extras["rotation"] <= 2
    alone = reduce(Aligned(side, 0.5), turned[:1], [1.0], sent)
    assert float((alone.state[B] @ alone.state[A] - product).norm() / product.norm()) < 1e-6


def test_it_is_fedit_at_strength_nothing_and_nearer_to_the_mean_product_elsewhere(tiny_bert: Path, tiny_csv: Path) -> None:
    """Clients of one label each, which go far from each other in a round."""

    def run(*method: str) -> Federation:
        apart = ("federation.partition.kind=shard", "federation.num_rounds=4", "train.local_steps=6", "train.lr=0.03", "init.kind=random")
        return federate([*classification(tiny_bert, tiny_csv), *apart, *method])

    plain, none = run("method=fedavg_lora"), run("method=fedrot_lora", "method.options.strength=0")
    turned = run("method=fedrot_lora")
    assert none.sha256 == plain.sha256
    assert turned.sha256 != plain.sha256
    gaps = [[record.exactness_gap for record in each.records[1:]] for each in (plain, turned)]
    assert gaps[0][0] == gaps[1][0]
    assert all(with_it < without for without, with_it in zip(*(each[1:] for each in gaps), strict=True))
    assert "rotation" not in turned.records[1].extras
    assert all(record.extras["rotation"] > 0.01 for record in turned.records[2:])
    second = turned.grid.rounds()[2]
    layouts = turned.prepared.adapted.layouts
    uploads = [e.answer.state(layouts.up_in(2)) for e in second]
    sent, weights = second[0].instruction.state(layouts.down), [float(e.answer.num_examples) for e in second]
    wanted = reduce(Aligned("A", 0.5), uploads, weights, sent).state  # the paper's round 1, its first odd one, aligns A
    for name, t in turned.kept.states[2].items():
        torch.testing.assert_close(t.double(), wanted[name].double(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("given", ["-0.1", "1.5", "true", "much"])
def test_a_strength_that_cannot_be_is_told_in_one_line(given: str, tiny_bert: Path, tiny_csv: Path) -> None:
    with pytest.raises(UserError, match=r"^method\.options\.strength=\S+ must be a number from 0, which is FedIT, to 1$"):
        federate([*classification(tiny_bert, tiny_csv), "method=fedrot_lora", f"method.options.strength={given}"])


def test_the_papers_strength_is_the_default() -> None:
    assert load(["method=fedrot_lora"]).method.options == {"strength": 0.5}
