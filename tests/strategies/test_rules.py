"""Rules over uploads of any shapes, ranks, weights and cohorts, each against its paper's formula, dense in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.core.state import Name, State
from strategies import STRATEGIES
from strategies.decomposing import SPLITS, Cut, Decomposing
from strategies.methods.fedrot_lora import Aligned
from strategies.methods.flora import Stacking
from strategies.methods.hetlora import NormWeighted
from tests.strategies.rounds import BARE
from tests.strategies.uploads import HEADS, A, B, Case, added, cases, gaussian, law, reduce, size, wanted

LORA = SPECS["lora"]


@dataclass(frozen=True)
class Mixed:
    """Uploads of clients of several ranks, and what was sent, of the largest that there may be."""

    case: Case
    sent: State


@st.composite
def mixed(draw: st.DrawFn, least: int = 1) -> Mixed:
    rank = draw(st.integers(least, 4))
    m, n = draw(st.tuples(st.integers(rank, 14), st.integers(rank, 14)))
    ranks = draw(st.lists(st.integers(1, rank), min_size=1, max_size=5))
    weights = draw(st.lists(st.integers(1, 500), min_size=len(ranks), max_size=len(ranks)))
    seed = draw(st.integers(0, 2**32))

    def upload(r: int, seed: int) -> State:
        return State({B: gaussian(m, r, seed=seed), A: gaussian(r, n, seed=seed + 1), HEADS: gaussian(3, seed=seed + 2)})

    uploads = tuple(upload(r, seed + 10 + 3 * i) for i, r in enumerate(ranks))
    return Mixed(Case(uploads, tuple(map(float, weights)), draw(st.sampled_from([0.3, 1.0, 5 / 3])), rank), upload(rank, seed))


def head_of(case: Case) -> Tensor:
    return torch.stack([share * u[HEADS].double() for share, u in zip(case.shares, case.uploads, strict=True)]).sum(0)


def method(name: str, case: Case) -> Any:
    return STRATEGIES[name](**{**BARE, "spec": SPECS[name], "scale": case.scale})  # type: ignore[arg-type]


@law
@given(mixed())
def test_a_stack_is_the_mean_of_the_products(drawn: Mixed) -> None:
    """FLoRA: weights on one side alone, s once, the ranks as they come, m or n equal to one of them too."""
    found = reduce(Stacking(LORA, drawn.case.scale), drawn.case.uploads, drawn.case.weights)
    assert float((added(found) - wanted(drawn.case)).norm()) <= 1e-6 * size(drawn.case)
    assert found.log[Name("x", "U")].shape[1] == sum(u[A].shape[0] for u in drawn.case.uploads)
    torch.testing.assert_close(found.state[HEADS], head_of(drawn.case))


@pytest.mark.parametrize("energy", [None, 0.7, 0.95])
@law
@given(mixed(least=2), st.sampled_from(sorted(SPLITS)))
def test_a_decomposed_mean_misses_what_a_dense_svd_of_its_rank_does(energy: float | None, drawn: Mixed, split: str) -> None:
    """FlexLoRA and FLoRIST: Eckart-Young, whatever the split; and what each split says of the singular values."""
    case, ranks = drawn.case, [u[A].shape[0] for u in drawn.case.uploads]
    found = reduce(Decomposing(LORA, ranks, Cut(energy, split)), case.uploads, case.weights, drawn.sent)
    dense = wanted(case) / case.scale
    s = torch.linalg.svdvals(dense)
    b, a = found.state[B].double(), found.state[A].double()
    assert (b.shape[1], a.shape[0]) == (case.rank, case.rank)
    share = s.square().cumsum(0) / s.square().sum()
    kept = min(case.rank, int((s > 1e-7 * s[0]).sum()), len(s) if energy is None else 1 + int((share < energy).sum()))
    assert found.extras["kept_rank"] == kept
    assert float((b @ a - dense).norm()) == pytest.approx(float(s[kept:].norm()), abs=1e-6 * size(case) / case.scale)
    strong = s[:kept] > 1e-3 * s[0]
    norms = {"left": s, "balanced": s.sqrt(), "right": torch.ones_like(s)}[split]
    torch.testing.assert_close(b.norm(dim=0)[:kept][strong], norms[:kept][strong], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.state[HEADS], head_of(case))


@law
@given(cases(), st.sampled_from("AB"), st.sampled_from([0.2, 0.5, 1.0]))
def test_rotated_uploads_keep_their_products_and_their_mean_is_taken(case: Case, side: str, strength: float) -> None:
    """FedRot: ``(B_i R)(Rᵀ A_i) = B_i A_i`` of each, and the factors' means of those."""
    sent = State({name: t + gaussian(*t.shape, seed=5) for name, t in case.uploads[0].items()})
    alone = [reduce(Aligned(side, strength), [u], [1.0], sent).state for u in case.uploads]
    for before, after in zip(case.uploads, alone, strict=True):
        torch.testing.assert_close(after[B] @ after[A], before[B].double() @ before[A].double(), rtol=1e-9, atol=1e-9)
    found = reduce(Aligned(side, strength), case.uploads, case.weights, sent).state
    for name in (B, A, HEADS):
        mean = torch.stack([share * each[name].double() for share, each in zip(case.shares, alone, strict=True)]).sum(0)
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-9, atol=1e-9)


@law
@given(cases())
def test_fedsvd_turns_a_product_and_noise_on_b_is_noise_of_one_norm(case: Case) -> None:
    """A is orthonormal, so that ``‖dB A‖ = ‖dB‖`` whatever dB is."""
    mean, held = case.uploads[0].map(Tensor.double), case.uploads[-1]
    found = method("fedsvd", case).follow(State({B: mean[B], HEADS: mean[HEADS]}), held).state
    b, a = found[B].double(), found[A].double()
    product = mean[B] @ held[A].double()
    assert float((b @ a - product).norm()) <= 1e-6 * float(mean[B].norm() * held[A].norm())
    noise = gaussian(*b.shape, seed=9).double()
    assert float((noise @ a).norm()) == pytest.approx(float(noise.norm()), rel=1e-5)


@law
@given(cases())
def test_frlora_adds_what_the_product_of_the_means_has_moved_and_hands_the_pair_out_again(case: Case) -> None:
    mean, held = case.uploads[0].map(Tensor.double), case.uploads[-1]
    found = method("frlora", case).follow(mean, held)
    moved = case.scale * (mean[B] @ mean[A] - held[B].double() @ held[A].double())
    assert float((added(found) - moved).norm()) <= 1e-6 * size(case)
    assert all(torch.equal(found.state[name], held[name]) for name in (A, B))
    assert torch.equal(found.state[HEADS], mean[HEADS])


@law
@given(mixed())
def test_hetlora_pads_with_zeros_and_weighs_by_norms(drawn: Mixed) -> None:
    """Of the columns that somebody holds; the others are as they were sent."""
    case = drawn.case
    norms = [float((u[B].double() @ u[A].double()).norm()) for u in case.uploads]
    b, a = drawn.sent[B].double().clone(), drawn.sent[A].double().clone()
    most = max(u[A].shape[0] for u in case.uploads)
    b[:, :most], a[:most] = 0, 0
    for norm, u in zip(norms, case.uploads, strict=True):
        b[:, : u[A].shape[0]] += norm / sum(norms) * u[B].double()
        a[: u[A].shape[0]] += norm / sum(norms) * u[A].double()
    found = reduce(NormWeighted(LORA), case.uploads, case.weights, drawn.sent).state
    torch.testing.assert_close(found[B], b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[A], a, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[HEADS], head_of(case))
