"""After a round every client holds the mean of what was trained, where a method claims so; elsewhere the gap is told as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsb.core.state import HEAD, Name, State
from tests.strategies.federations import Exchange, Federation, federate, mean_update, next_instructions, product
from tests.strategies.rounds import CASES, EXACT, GROWING, METHODS, MODELS, Options, Plain, assert_held, minus, plus, pristine, relative


@pytest.mark.parametrize(("model", "method"), CASES)
def test_a_client_holds_the_mean_of_what_was_trained(plain: Plain, model: str, method: str, tmp_path: Path) -> None:
    """Where a method claims so; elsewhere it is off after the first round, or there is no such weight."""
    federation = plain(model, method)
    assert federation.prepared.strategy.is_exact == (method in EXACT)
    if federation.prepared.adapted.spec.sketch is not None:
        return  # its uploads are no factors: what they were made of, its own test remembers
    if method not in EXACT:
        assert_off(federation, tmp_path)
        return
    assert_held(federation, tmp_path)


def assert_off(federation: Federation, folder: Path) -> None:
    """Hold that a method which claims no exactness has none to claim."""
    if not federation.prepared.strategy.has_global_model:
        assert all(record.exactness_gap is None for record in federation.records)
        return
    exchanges, during, after = next(next_instructions(federation, folder))
    update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))
    wanted = plus(pristine(federation), update)
    assert relative(minus(after[0].weights, wanted), update) > 1e-3


def closed_form(federation: Federation, exchanges: list[Exchange]) -> float:
    """Return ``‖s Σ w_i (B_i − B̄)(A_i − Ā)‖ / ‖(s Σ w_i B_i A_i, head − first head)‖`` in float64; the head is averaged exactly."""
    layout, scale = federation.prepared.adapted.layouts.down, federation.prepared.adapted.scale
    uploads = [e.answer.state(layout) for e in exchanges]
    weights = torch.tensor([e.answer.num_examples for e in exchanges]).double()
    weights /= weights.sum()
    missed: list[Tensor] = []
    for module in federation.prepared.adapted.shapes:
        lefts, rights = (torch.stack([u[Name(module, role)].double() for u in uploads]) for role in ("B", "A"))
        left, right = (torch.einsum("i,ijk->jk", weights, stack) for stack in (lefts, rights))
        missed.append(scale * torch.einsum("i,ijr,irk->jk", weights, lefts - left, rights - right))
    update, head = mean_update(federation, exchanges, State())
    first = federation.prepared.initial.pick(HEAD)
    moved = [*update.values(), *(t - first[name].double() for name, t in head.items())]
    return float(torch.stack([t.norm() for t in missed]).norm() / torch.stack([t.norm() for t in moved]).norm())


@pytest.mark.parametrize("model", MODELS)
def test_the_gap_of_plain_averaging_is_its_closed_form(plain: Plain, model: str) -> None:
    federation = plain(model, "fedavg_lora")
    for number, exchanges in federation.grid.rounds().items():
        gap = federation.records[number].exactness_gap
        assert gap > 1e-3
        assert gap == pytest.approx(closed_form(federation, exchanges), rel=1e-4)


def test_uniform_weights_count_each_client_once(options: Options, plain: Plain, tmp_path: Path) -> None:
    federation = federate(options("tiny_bert", "fedex_lora", "federation.weighting=uniform"))
    base = pristine(federation)
    for exchanges, during, after in next_instructions(federation, tmp_path):
        update, _ = mean_update(federation, exchanges, during.basis.merge(during.state))  # takes the weighting from the configuration
        wanted = plus(base, update)
        assert all(relative(minus(held.weights, wanted), wanted) <= 1e-6 for held in after)
        base = minus(wanted, product(federation, after[0].state, after[0].basis))
    assert plain("tiny_bert", "fedex_lora").sha256 != federation.sha256


@pytest.mark.parametrize("method", METHODS)
def test_the_held_gap_counts_what_is_rounded_where_a_residual_is_added(plain: Plain, method: str) -> None:
    """Where a method adds nothing to frozen weights, what clients hold is their factors."""
    records = plain("tiny_bert", method).records[1:]
    assert records
    for record in records:
        if method in GROWING:
            assert record.held_gap == pytest.approx(record.exactness_gap, abs=1e-4)
            assert record.held_gap != record.exactness_gap
        else:
            assert record.held_gap == record.exactness_gap


@pytest.mark.parametrize("method", METHODS)
def test_a_round_tells_how_far_the_frozen_weights_have_gone(plain: Plain, method: str, tmp_path: Path) -> None:
    """Of what rounds have added, not the start: densely, from what clients hold in each round and held in the first."""
    federation = plain("tiny_bert", method)
    if method not in GROWING:
        assert not any("base_drift" in record.extras for record in federation.records)
        return
    whole = torch.stack([w.norm() for w in pristine(federation).values()]).norm()
    begun = None
    for exchanges, during, after in next_instructions(federation, tmp_path):
        begun = begun or minus(during.weights, product(federation, during.state, during.basis))
        frozen = minus(after[0].weights, product(federation, after[0].state, after[0].basis))
        gone = torch.stack([t.norm() for t in minus(frozen, begun).values()]).norm()
        found = federation.records[exchanges[0].instruction.round].extras["base_drift"]
        assert found == pytest.approx(float(gone / whole), rel=1e-3)
        assert found > 1e-5


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_server_optimiser_runs_and_is_told_apart_from_the_gap(options: Options, name: str) -> None:
    federation = federate(
        options(
            "tiny_bert",
            "fed_sb",
            f"federation.server_optimizer.name={name}",
            "federation.server_optimizer.lr=0.5",
            "federation.num_rounds=2",
        )
    )
    for record in federation.records[1:]:
        assert record.exactness_gap < 1e-5
        assert record.extras["server_step"] > 0
