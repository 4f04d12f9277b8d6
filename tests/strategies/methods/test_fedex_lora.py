"""FedEx-LoRA's rule: state and log together hold the mean of the products, and a truncated residual is the best of its rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.adapters import SPECS, Layouts
from fedsb.core.blocks import NOTHING
from fedsb.core.errors import UserError
from fedsb.core.state import Layout, Name, State
from strategies import FedExLoRA, Participation
from strategies.methods.fedex_lora import FedExReducer
from strategies.server_optimizer import server_optimizer
from tests.strategies.uploads import A, B, Case, added, cases, coarse, fine, held, law, reduce, size, wanted


@law
@given(cases())
def test_fedex_holds_the_mean_of_the_products(case: Case) -> None:
    aggregate = reduce(FedExReducer(case.scale, fine), case.uploads, case.weights)
    error = float((held(case, aggregate) - wanted(case)).norm())
    assert error <= 1e-6 * size(case)
    assert error <= 1e-5 * float(wanted(case).norm()) + 1e-7 * size(case)
    clients = len(case.uploads)
    rank = aggregate.log[Name("x", "U")].shape[1] if len(aggregate.log) else 0
    assert rank == (clients - 1) * case.rank == fedex().residual_rank([case.rank] * clients)
    assert aggregate.extras["residual_rank"] == rank


@law
@given(cases())
def test_fedex_is_exact_over_a_wire_that_rounds(case: Case) -> None:
    """Means rounded to bfloat16 are off by 2^-9; the residual takes that up."""
    aggregate = reduce(FedExReducer(case.scale, coarse, coarse=True), case.uploads, case.weights)
    assert all(torch.equal(t, coarse(State({name: t}))[name]) for name, t in aggregate.state.pick("A", "B").items())
    assert float((held(case, aggregate) - wanted(case)).norm()) <= 1e-6 * size(case)
    assert aggregate.extras["residual_rank"] == fedex(wire_dtype="bfloat16").residual_rank([case.rank] * len(case.uploads))


@law
@given(cases(min_clients=2), st.integers(1, 6))
def test_a_truncated_residual_is_the_best_of_its_rank(case: Case, kept: int) -> None:
    """Eckart-Young: the error of the best rank-r' matrix is the norm of the singular values left out."""
    aggregate = reduce(FedExReducer(case.scale, fine, truncate=kept), case.uploads, case.weights)
    mean = [torch.stack([s * u[name].double() for s, u in zip(case.shares, case.uploads, strict=True)]).sum(0) for name in (B, A)]
    residual = wanted(case) - case.scale * mean[0] @ mean[1]
    values = torch.linalg.svdvals(residual)
    whole = (len(case.uploads) - 1) * case.rank
    rank = min(kept, *residual.shape) if kept < whole else whole
    assert aggregate.log[Name("x", "U")].shape[1] == rank
    best = float(values[rank:].norm())
    assert float((added(aggregate) - residual).norm()) == pytest.approx(best, rel=1e-4, abs=1e-6 * size(case))
    # Nothing is truncated where the rank allows all of it, whatever rounding says.
    dense = best / float(values.norm()) if kept < whole else 0.0
    assert aggregate.extras["truncation_error"] == pytest.approx(dense, rel=1e-4, abs=1e-5)


def fedex(*, up: Layout = NOTHING, **options: object) -> FedExLoRA:
    layouts = Layouts(NOTHING, (up,), NOTHING)
    return FedExLoRA(spec=SPECS["lora"], layouts=layouts, scale=1.0, participation=Participation(("a",)), **options)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_server_optimiser_with_fedex_is_refused(name: str) -> None:
    with pytest.raises(
        UserError,
        match=r"server_optimizer is not defined with FedExLoRA: .* use federation\.server_optimizer\.name=none",
    ):
        fedex(server_optimizer=server_optimizer(name))


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_a_truncation_to_no_rank_is_refused(rank: float) -> None:
    with pytest.raises(UserError, match=r"method\.options\.truncate=.* must be a rank of at least 1, or null"):
        fedex(truncate=rank)
