"""The SVD family: what is handed out is the best approximation of the dense mean product, and the round's figures say what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from strategies.decomposing import SPLITS, Cut, Decomposing
from strategies.products import gauge
from strategies.reducers import Aggregate
from tests.strategies.federations import federate, mean_update, next_instructions
from tests.strategies.rounds import Options, pristine

A, B = Name("m", "A"), Name("m", "B")
SHAPES = ((9, 7), (5, 12), (6, 6))
RANKS = ((3, 2, 1), (2, 2, 2), (1, 1))  # of the clients of a round, beside the server's, 3
WEIGHTS = (3.0, 2.0, 1.0)


def drawn(shape: tuple[int, int], ranks: tuple[int, ...]) -> list[State]:
    """Return the upload of each client."""
    draw, (m, n) = torch_generator(0, "cut off"), shape
    return [State({B: torch.randn(m, rank, generator=draw), A: torch.randn(rank, n, generator=draw)}) for rank in ranks]


def decomposed(uploads: list[State], cut: Cut, ranks: tuple[int, ...] = ()) -> Aggregate:
    """Return what the rule makes of uploads, at the server's rank 3."""
    rule, (m, n) = Decomposing(SPECS["lora"], ranks, cut), (len(uploads[0][B]), uploads[0][A].shape[1])
    draw = torch_generator(1, "before")
    rule.begin(State({B: torch.zeros(m, 3), A: torch.randn(3, n, generator=draw)}))
    for upload, weight in zip(uploads, WEIGHTS, strict=False):
        rule.add(upload, weight)
    return rule.finish()


def mean(uploads: list[State]) -> Tensor:
    weights = WEIGHTS[: len(uploads)]
    return torch.stack([w / sum(weights) * u[B].double() @ u[A].double() for u, w in zip(uploads, weights, strict=True)]).sum(0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("energy", [None, 0.6, 1.0])
def test_what_is_handed_out_is_the_dense_mean_cut_by_its_svd(
    shape: tuple[int, int], ranks: tuple[int, ...], split: str, energy: float | None
) -> None:
    """Whatever the split; with p as the energy asks for, and every component in reach of a gradient."""
    uploads = drawn(shape, ranks)
    dense = mean(uploads)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    shares = [float(s[:rank].square().sum() / s.square().sum()) for rank in range(4)]
    kept = min((rank for rank in range(1, 4) if shares[rank] >= (energy or 2) - 1e-12), default=min(3, sum(ranks)))
    found = decomposed(uploads, Cut(energy, split))
    b, a = found.state[B].double(), found.state[A].double()
    assert b.shape == (shape[0], 3)
    assert a.shape == (3, shape[1])
    assert float((b @ a - (u[:, :kept] * s[:kept]) @ vh[:kept]).norm() / dense.norm()) < 1e-6
    assert found.extras == {
        "truncation_error": pytest.approx(max(0.0, 1 - shares[kept]) ** 0.5, abs=1e-6),
        "kept_rank": kept,
        "kept_rank_max": kept,
        "kept_energy": pytest.approx(shares[kept], abs=1e-6),
        "energy_first": pytest.approx(shares[1], abs=1e-6),
        "energy_quarter": pytest.approx(shares[1], abs=1e-6),
        "energy_half": pytest.approx(shares[1], abs=1e-6),
        "energy_rank": pytest.approx(shares[3], abs=1e-6),
    }
    columns, rows = b.norm(dim=0), a.norm(dim=1)
    given = {"left": (s, torch.ones(9)), "balanced": (s.sqrt(), s.sqrt()), "right": (torch.ones(9), s)}[split]
    assert torch.allclose(columns[:kept], given[0][:kept].double(), rtol=1e-5)
    assert torch.allclose(rows[:kept], given[1][:kept].double(), rtol=1e-5)
    idle, able = (rows, columns) if split == "right" else (columns, rows)
    assert not idle[kept:].any()
    assert torch.allclose(able[kept:], torch.ones_like(able[kept:]))


@pytest.mark.parametrize(("model", "method"), [("tiny_gpt2", "flexlora"), ("tiny_llama", "florist")])
def test_a_client_holds_the_best_of_its_rank_of_the_dense_mean(model: str, method: str, options: Options, tmp_path: Path) -> None:
    """Conv1D and grouped heads, where a transpose too few or too many has another shape or another product; s = 5 / 3."""
    more = ("method.options.energy=null", "method.options.split=balanced", "federation.num_rounds=3")
    federation = federate(options(model, method, *more))
    assert any(m != n for m, n in federation.prepared.adapted.shapes.values())
    base = pristine(federation)
    for exchanges, during, after in next_instructions(federation, tmp_path):
        update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))
        for module, dense in update.items():
            u, s, vh = torch.linalg.svd(dense, full_matrices=False)
            best = base[module] + (u[:, :3] * s[:3]) @ vh[:3]
            assert s[3] > 1e-3 * s[0]
            assert all(float((held.weights[module] - best).norm()) <= 1e-6 * float(best.norm()) for held in after)


def test_balanced_factors_have_one_norm_and_the_splits_one_product() -> None:
    uploads = drawn((9, 7), (3, 2, 1))
    made = {split: decomposed(uploads, Cut(None, split)) for split in SPLITS}
    products = [each.state[B].double() @ each.state[A].double() for each in made.values()]
    assert max(float((each - products[0]).norm() / products[0].norm()) for each in products) < 1e-6
    norms = {split: gauge(SPECS["lora"], each.state)["gauge"] for split, each in made.items()}
    assert norms["balanced"] == pytest.approx(1, abs=1e-6)
    assert norms["left"] == pytest.approx(1 / norms["right"], rel=1e-5)
    assert norms["left"] > 1.5


def test_what_is_cut_off_is_told_as_the_dense_mean_has_it() -> None:
    """Beyond the server's rank 3, and beyond the ranks 1 and 2 of two of its clients, against singular values of the (m, n) mean."""
    uploads = drawn((9, 7), (3, 2, 1))
    energy = torch.linalg.svdvals(mean(uploads)).square()
    beyond = [float(energy[rank:].sum() / energy.sum()) for rank in (1, 2, 3)]
    found = decomposed(uploads, Cut(), (1, 2, 3)).extras
    assert found["truncation_error"] == pytest.approx(beyond[2] ** 0.5, rel=1e-6)
    assert found["cut_error"] == pytest.approx((sum(beyond) / 3) ** 0.5, rel=1e-6)
    assert 0.05 < found["truncation_error"] < found["cut_error"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_mean_of_nothing_is_nothing_that_can_learn(split: str) -> None:
    """B is zero at the start, and stays so where nobody moves it."""
    uploads = [State({B: torch.zeros(9, 3), A: each[A]}) for each in drawn((9, 7), (3, 3))]
    found = decomposed(uploads, Cut(0.9, split))
    assert (found.extras["kept_rank"], found.extras["truncation_error"], found.extras["kept_energy"]) == (0, 0, 1)
    b, a = found.state[B], found.state[A]
    assert not (b @ a).any()
    assert torch.allclose(a.norm(dim=1) + b.norm(dim=0), torch.ones(3))


@pytest.mark.parametrize("given", [{"energy": 0}, {"energy": 1.1}, {"energy": "half"}, {"energy": True}, {"split": "middle"}], ids=str)
def test_a_cut_that_cannot_be_is_told_in_one_line(given: dict[str, object]) -> None:
    with pytest.raises(
        UserError, match=r"^method\.options\.(energy=\w+[.\d]* must be a share above 0|split=middle is unknown; choose from left)"
    ):
        Cut(**given)  # type: ignore[arg-type]
