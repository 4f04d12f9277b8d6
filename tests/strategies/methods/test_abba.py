"""ABBA in a federation: what means of its factors miss, and which of its forms miss nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from strategies import STRATEGIES
from strategies.combinations import Wanted, check_wanted
from tests.strategies.federations import Federation, classification, federate

Run = Callable[..., Federation]
ROUNDS = ["federation.num_rounds=5", "federation.fraction=0.6", "train.lr=0.02", "adapter.scale=1.7"]


@pytest.fixture
def run(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    return lambda *more: federate([*classification(tiny_bert, tiny_csv), *ROUNDS, *more])


def gaps(federation: Federation) -> list[float]:
    return [record.exactness_gap for record in federation.records[1:] if record.exactness_gap is not None]


def test_means_of_four_factors_are_not_exact_with_two_clients(run: Run) -> None:
    two = ["federation.num_clients=2", "federation.partition.sizes=[2,1]", "federation.fraction=1", "federation.num_rounds=2"]
    assert min(gaps(run("method=abba", *two))) > 1e-3


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("method", ["abba_masked", "abba_alternating", "abba_core"])
def test_its_exact_forms_are_exact_whatever_the_split_of_the_rank(method: str, first: int, run: Run) -> None:
    assert max(gaps(run(f"method={method}", f"adapter.options.first={first}"))) < 1e-5


def test_a_diagonal_core_moves_as_many_values_as_the_pairs_ranks_multiply_to(run: Run) -> None:
    federation = run("method=abba_core", "adapter.options.diagonal=true", "rank=5")
    adapted = federation.prepared.adapted
    assert adapted.layouts.up_in(1).numel - sum(p.numel() for n, p in adapted.model.named_parameters() if n in adapted.head) == 6 * len(
        adapted.shapes
    )
    assert max(gaps(federation)) < 1e-5


def test_factors_take_turns_and_b2_begins() -> None:
    assert [SPECS["abba_alternating"].learn(number) for number in range(1, 6)] == [("B2",), ("A2",), ("B1",), ("A1",), ("B2",)]


def test_the_mask_is_the_same_at_every_client_and_never_moves(run: Run) -> None:
    bases = run("method=abba_masked").kept.bases
    for name, t in bases[0].items():
        assert name.role in ("B1", "A1")
        assert torch.equal(t, bases[-1][name])


@pytest.mark.parametrize(
    ("given", "s"), [((), 8.0), (("rank=8",), 4.0), (("adapter.options.first=4",), 48**0.5), (("adapter.alpha=32",), 2.0)]
)
def test_s_is_the_root_of_the_ranks_product_where_nothing_is_said(given: tuple[str, ...], s: float) -> None:
    c = load(["method=abba", *given]).adapter
    assert c.scale is None
    assert c.alpha / c.rank == pytest.approx(s)


def test_s_is_what_is_given() -> None:
    assert load(["method=abba", "adapter.scale=24"]).adapter.scale == 24.0
    with pytest.raises(UserError, match=r"^adapter\.scale=0\.0 is out of range; it must be above 0$"):
        load(["method=abba", "adapter.scale=0"])


def test_a_mask_takes_no_server_optimiser() -> None:
    with pytest.raises(UserError, match=r"^federation\.server_optimizer is not defined with abba_masked: "):
        check_wanted(STRATEGIES["abba_masked"], SPECS["abba_masked"], Wanted(server_optimizer=True), "abba_masked")
