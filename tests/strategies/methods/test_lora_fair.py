"""LoRA-FAIR: what is handed out is the minimum of its objective, held against steps by autograd on dense products in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import State
from strategies.methods.lora_fair import Correcting
from strategies.reducers import PlainMean
from tests.strategies.federations import classification, federate
from tests.strategies.uploads import HEADS, A, B, Case, cases, gaussian, law, reduce, wanted


def objective(b: Tensor, case: Case, strength: float) -> Tensor:
    """Return ``−cos(ΔW, b Ā) + λ ‖b − B̄‖`` with everything dense."""
    means = reduce(PlainMean(), case.uploads, case.weights).state
    product = b @ means[A]
    return -torch.cosine_similarity(wanted(case).flatten(), product.flatten(), dim=0) + strength * (b - means[B]).norm()


def handed_out(case: Case, strength: float) -> Tensor:
    return reduce(partial(Correcting, SPECS["lora"], strength)(), case.uploads, case.weights).state[B].double()


def stepped(begun: Tensor, case: Case, strength: float) -> float:
    """Return the objective that L-BFGS by autograd ends with."""
    b = begun.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([b], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def again() -> Tensor:
        optimizer.zero_grad()
        value = objective(b, case, strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(again)  # type: ignore[no-untyped-call]
    return float(objective(b.detach(), case, strength))


@law
@given(cases(), st.sampled_from([0.0, 1e-3, 0.01, 0.3, 30.0]))
def test_it_is_never_worse_than_the_means_and_all_but_b_is_their_mean(case: Case, strength: float) -> None:
    found, means = (reduce(rule, case.uploads, case.weights).state for rule in (Correcting(SPECS["lora"], strength), PlainMean()))
    assert torch.equal(found[A], means[A])
    assert torch.equal(found[HEADS], means[HEADS])
    assert float(objective(found[B].double(), case, strength)) <= float(objective(means[B], case, strength)) + 1e-9


def near(seed: int, shape: tuple[int, int]) -> Case:
    """Return uploads of three clients that went apart from one pair, in a round as training has it."""
    m, n = shape
    common = gaussian(m, 3, seed=seed), gaussian(3, n, seed=seed + 1)
    pairs = [[t + 0.6 * gaussian(*t.shape, seed=10 * seed + 2 * i + j) for j, t in enumerate(common)] for i in range(3)]
    return Case(tuple(State({B: 0.2 * b, A: a}) for b, a in pairs), (3.0, 1.0, 2.0), 0.7, 3)


@pytest.mark.parametrize("strength", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(9, 7), (5, 12), (4, 4)], ids=str)
def test_no_steps_from_anywhere_lead_lower(shape: tuple[int, int], strength: float) -> None:
    for seed in (1, 2, 3):
        case = near(seed, shape)
        found, mean = handed_out(case, strength), reduce(PlainMean(), case.uploads, case.weights).state[B]
        reached = float(objective(found, case, strength))
        begun = [mean + 0.01 * gaussian(*mean.shape, seed=4), 2 * mean, found + 1e-3 * gaussian(*mean.shape, seed=5)]
        assert strength > 0.01 or reached < float(objective(mean, case, strength)) - 1e-4
        assert reached <= min(stepped(each, case, strength) for each in begun) + 1e-8


def test_unheld_it_has_the_best_cosine_that_there_is_and_is_the_nearest_such_b() -> None:
    case = near(1, (9, 7))
    found, means = handed_out(case, 0.0), reduce(PlainMean(), case.uploads, case.weights).state
    best = wanted(case) @ torch.linalg.pinv(means[A])
    torch.testing.assert_close(found / found.norm(), best / best.norm(), atol=1e-7, rtol=0)
    assert float(((found - means[B]) * best).sum()) == pytest.approx(0, abs=1e-8)


def test_the_more_it_is_held_the_less_it_moves_until_it_is_fedit() -> None:
    case = near(2, (9, 7))
    mean = reduce(PlainMean(), case.uploads, case.weights).state[B]
    moved = [float((handed_out(case, strength) - mean).norm()) for strength in (0.0, 0.01, 0.1, 1.0, 100.0)]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 1.1 * moved[2] > 0
    assert torch.equal(handed_out(case, 100.0), mean)


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_one_client_needs_no_correction(strength: float) -> None:
    case = near(3, (5, 12))
    alone = Case(case.uploads[:1], (2.0,), case.scale, case.rank)
    assert torch.equal(handed_out(alone, strength), case.uploads[0][B].double())


def test_zero_and_missing_directions_are_left_as_they_are() -> None:
    """B that nobody has moved yet, and a row of A that is zero at everyone."""
    case = near(1, (6, 8))
    still = Case(tuple(State({B: 0 * u[B], A: u[A]}) for u in case.uploads), case.weights, case.scale, case.rank)
    assert not handed_out(still, 0.01).any()
    cut = Case(tuple(State({B: u[B], A: u[A] * torch.tensor([[1.0], [1.0], [0.0]])}) for u in case.uploads), (3.0, 1.0, 2.0), 0.7, 3)
    mean = reduce(PlainMean(), cut.uploads, cut.weights).state[B]
    for strength in (0.0, 0.01):
        found = handed_out(cut, strength)
        torch.testing.assert_close(found[:, 2], mean[:, 2], atol=1e-12, rtol=0)
        assert float((found - mean).norm()) > 1e-3


def test_a_run_is_fedit_where_it_is_held_and_tells_how_far_it_goes_elsewhere(tiny_bert: Path, tiny_csv: Path) -> None:
    """And it is nearer to the mean product then, by its gap."""
    apart = ("federation.partition.kind=shard", "federation.num_rounds=3", "train.local_steps=6", "train.lr=0.03", "init.kind=random")
    data = [*classification(tiny_bert, tiny_csv), *apart]
    plain, held, free = (
        federate([*data, *more])
        for more in (["method=fedavg_lora"], ["method=lora_fair", "method.options.strength=1e6"], ["method=lora_fair"])
    )
    assert held.sha256 == plain.sha256 != free.sha256
    assert [record.extras["correction"] for record in held.records[1:]] == [0.0] * 3
    assert all(record.extras["correction"] > 0.01 for record in free.records[1:])
    assert (free.records[1].exactness_gap or 0) < (plain.records[1].exactness_gap or 0)


@pytest.mark.parametrize("given", ["-0.1", "true", "much", "inf"])
def test_a_strength_that_cannot_be_is_told_in_one_line(given: str, tiny_bert: Path, tiny_csv: Path) -> None:
    with pytest.raises(UserError, match=r"^method\.options\.strength=\S+ must be a number of at least 0"):
        federate([*classification(tiny_bert, tiny_csv), "method=lora_fair", f"method.options.strength={given}"])


def test_the_papers_strength_is_the_default() -> None:
    assert load(["method=lora_fair"]).method.options == {"strength": 0.01}
