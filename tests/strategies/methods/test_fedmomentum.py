"""FedMomentum: pair and rest are the mean product, the pair its best approximation; what the energy cuts is all that is missed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedsb.adapters import SPECS
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State
from strategies.decomposing import Cut
from strategies.methods.fedmomentum import PairAndRest
from strategies.reducers import Aggregate
from tests.strategies.federations import classification, federate
from tests.strategies.rounds import MODELS, Options, assert_held
from tests.strategies.uploads import A, B, Case, added, cases, coarse, fine, gaussian, held, law, reduce, size, wanted

U = Name("x", "U")
Decode = Callable[[State], State]


def handed_out(case: Case, energy: float | None = 1.0, truncate: int | None = None, decode: Decode = fine) -> Aggregate:
    rule = PairAndRest(SPECS["lora"], case.scale, Cut(energy, "balanced"), decode, coarse=decode is coarse, truncate=truncate)
    return reduce(rule, case.uploads, case.weights, case.uploads[0])


@pytest.mark.parametrize("decode", [fine, coarse], ids=["float32", "bfloat16"])
@law
@given(cases())
def test_pair_and_rest_are_the_mean_product_as_clients_decode_it(decode: Decode, case: Case) -> None:
    """Of any shape, with s in both of them."""
    found = handed_out(case, decode=decode)
    there = Aggregate(decode(found.state), found.log)
    assert float((held(case, there) - wanted(case)).norm()) <= 1e-5 * max(size(case), float(wanted(case).norm()))
    beyond = (len(case.uploads) - 1) * case.rank + (2 * case.rank if decode is coarse else 0)
    assert (U in found.log) is (beyond > 0)
    assert not beyond or found.log[U].shape == (len(case.uploads[0][B]), beyond)


@law
@given(cases(min_clients=2))
def test_the_pair_is_the_best_of_its_rank_in_two_halves_of_one_size(case: Case) -> None:
    found = handed_out(case)
    b, a = found.state[B].double(), found.state[A].double()
    u, s, vh = torch.linalg.svd(wanted(case) / case.scale)
    best = (u[:, : case.rank] * s[: case.rank]) @ vh[: case.rank]
    assert float((b @ a - best).norm()) <= 1e-5 * float(s[0])
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-5, atol=1e-6)


def unequal() -> Case:
    """Return three uploads of rank 2 whose mean product has six components, each half as large as the one before."""
    u, _ = torch.linalg.qr(gaussian(13, 6, seed=1).double())
    v, _ = torch.linalg.qr(gaussian(9, 6, seed=2).double())
    values = torch.tensor([2.0**-i for i in range(6)], dtype=torch.float64)
    pairs = [(u[:, i::3] * values[i::3] * 3, v[:, i::3].T) for i in range(3)]
    return Case(tuple(State({B: b.float(), A: a.float()}) for b, a in pairs), (1.0, 1.0, 1.0), 0.7, 2)


def missed(case: Case, found: Aggregate) -> float:
    return float((held(case, found) - wanted(case)).norm() / wanted(case).norm())


def tail(kept: int) -> float:
    squares: Tensor = torch.tensor([4.0**-i for i in range(6)])
    return float((squares[kept:].sum() / squares.sum()).sqrt())


@pytest.mark.parametrize(("energy", "kept"), [(0.5, 2), (0.98, 3), (0.995, 4), (0.9999, 6), (None, 6)])
def test_the_least_rest_that_keeps_the_energy_is_added_and_no_less_than_the_pair_is_kept(energy: float | None, kept: int) -> None:
    found = handed_out(unequal(), energy)
    assert missed(unequal(), found) == pytest.approx(tail(kept), abs=1e-6)
    assert found.extras["truncation_error"] == pytest.approx(tail(kept), abs=1e-6)
    assert found.extras["kept_rank"] == kept
    assert found.log[U].shape == (13, 4)  # whatever is zero in it
    assert int(found.log[U].any(dim=0).sum()) == kept - 2


@pytest.mark.parametrize("truncate", [1, 3, 9])
def test_a_rest_of_fewer_components_is_its_best_and_costs_less(truncate: int) -> None:
    found = handed_out(unequal(), None, truncate)
    assert missed(unequal(), found) == pytest.approx(tail(2 + min(truncate, 4)), abs=1e-6)
    assert found.log[U].shape == (13, min(truncate, 4))


def test_one_client_has_no_rest_and_keeps_its_product() -> None:
    case = unequal()
    alone = Case(case.uploads[:1], (3.0,), case.scale, case.rank)
    found = handed_out(alone, 0.5)
    assert len(found.log) == 0
    assert added(found) == 0.0
    assert missed(alone, found) < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_with_all_of_the_energy_everyone_holds_the_mean_of_what_was_trained(model: str, options: Options, tmp_path: Path) -> None:
    """Non-square, Conv1D and grouped heads; three of five clients of unequal size a round; s = 5/3."""
    federation = federate(options(model, "fedmomentum", "method.options.energy=1", "federation.num_rounds=5"))
    assert federation.prepared.strategy.is_exact
    assert_held(federation, tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    {
        "energy=0": r"^method\.options\.energy=0 must be a share above 0 and up to 1, or null",
        "energy=1.5": r"^method\.options\.energy=1\.5 must be a share",
        "truncate=0": r"^method\.options\.truncate=0 must be a rank of at least 1, or null",
        "truncate=true": r"^method\.options\.truncate=True must be a rank",
        "split=half": r"^method\.options\.split=half is unknown; choose from left, balanced, right",
    }.items(),
)
def test_options_that_cannot_be_are_told_in_one_line(given: str, said: str, tiny_bert: Path, tiny_csv: Path) -> None:
    with pytest.raises(UserError, match=said):
        federate([*classification(tiny_bert, tiny_csv), "method=fedmomentum", f"method.options.{given}"])
