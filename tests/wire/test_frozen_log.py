"""A log's head names all that it holds, and its bundles carry that in the smallest way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.adapters.residual import dense_is_cheaper
from fedsb.core.errors import RunError
from fedsb.core.state import Name, State
from fedsb.wire.frozen import ROOT, FrozenLog
from fedsb.wire.frozen_cache import FrozenCache
from tests.wire.logs import SHAPES, assert_holds, basis, delta, law, log_of


@law
@given(st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_the_dense_sum_goes_exactly_where_it_is_smaller(rank_by_version: list[int]) -> None:
    """Of rank ρ, factors hold ρ (m + n) values and the sum m n: dense where ρ > m n / (m + n)."""
    versions = [dict.fromkeys(SHAPES, rank) for rank in rank_by_version]
    log = log_of(versions, with_basis=False)
    for since in range(log.version):
        bundle = log.bundle(since)
        assert bundle is not None
        for module, (m, n) in SHAPES.items():
            roles = {name.role[0] for name in bundle.state if name.module == module}
            total = sum(rank_by_version[since:])
            assert roles == ({"D"} if total > m * n / (m + n) else {"U", "V"})
            values = sum(t.numel() for name, t in bundle.state.items() if name.module == module)
            assert values == min(m * n, total * (m + n))


@pytest.mark.parametrize(("rank", "dense"), [(2, False), (3, False), (4, True)])
def test_at_equal_size_factors_are_sent(rank: int, dense: bool) -> None:
    """6 · 6 / (6 + 6) = 3."""
    assert dense_is_cheaper(rank, 6, 6) is dense


def test_the_basis_goes_along_where_a_sum_is_sent_densely(folder: Path) -> None:
    log = log_of([dict.fromkeys(SHAPES, 3)] * 3, with_basis=True)
    bundle = log.bundle(0)
    assert bundle is not None
    assert {name.role[0] for name in bundle.state} == {"A", "B", "D"}
    assert bundle.one_off == sum(t.numel() for name, t in bundle.state.items() if name.role[0] in "AB")
    store = FrozenCache(folder)
    store.receive(bundle)
    assert_holds(store.load(log.head), log, log.version)


def test_a_bundle_does_not_change_when_the_log_grows() -> None:
    log = log_of([dict.fromkeys(SHAPES, 3)] * 2, with_basis=False)
    bundle = log.bundle(0)
    assert bundle is not None
    before = {name: t.clone() for name, t in bundle.state.items()}
    log.append(delta(dict.fromkeys(SHAPES, 1), seed=99))
    assert all(torch.equal(t, before[name]) for name, t in bundle.state.items())


def test_heads_name_the_content_of_the_whole_chain() -> None:
    one, same = (log_of([{"wide": 1}, {"tall": 2}], with_basis=True) for _ in range(2))
    assert one.heads == same.heads
    assert len(set(one.heads)) == one.version + 1
    assert one.heads[0] == ROOT
    other = FrozenLog()
    changed = delta({"wide": 1}, seed=0)
    changed[Name("wide", "U")][0, 0] += 2.0**-20
    for step in (basis(), changed, delta({"tall": 2}, seed=10)):
        other.append(step)
    assert other.heads[1] == one.heads[1]
    assert other.heads[2] != one.heads[2]
    assert other.heads[3] != one.heads[3]  # the third delta is the same, its past is not


def test_the_same_values_under_another_name_or_shape_have_another_head() -> None:
    heads = set()
    for module, shape in (("a", (2, 3)), ("b", (2, 3)), ("a", (3, 2))):
        log = FrozenLog()
        log.append(State({Name(module, "A"): torch.zeros(shape)}))
        heads.add(log.head)
    assert len(heads) == 3


def test_an_empty_delta_changes_nothing() -> None:
    log = FrozenLog()
    log.append(State())
    assert (log.version, log.head, log.bundle(0)) == (0, ROOT, None)


def test_a_delta_that_overflowed_stops_the_run_and_leaves_the_log_alone() -> None:
    log = log_of([dict.fromkeys(SHAPES, 1)], with_basis=False)
    head, poisoned = log.head, delta(dict.fromkeys(SHAPES, 1), 5)
    poisoned[Name("tall", "V")][0, 0] = float("inf")
    with pytest.raises(RunError, match="the frozen weight of 'tall'"):
        log.append(poisoned)
    assert (log.head, log.version) == (head, 1)


def test_what_everybody_makes_is_held_and_never_sent() -> None:
    """Beside what the log brings, before it and after it; heads, bundles and hashes do not know of it."""
    made = State({Name("tall", "M"): torch.arange(6.0).view(2, 3)})
    log, plain = (log_of([dict.fromkeys(SHAPES, 1)], with_basis=True) for _ in range(2))
    log.bring(made)
    for each in (log, plain):
        each.append(delta(dict.fromkeys(SHAPES, 1), 7))
    bundle = log.bundle(0)
    assert bundle is not None
    assert "M" not in {name.role.split("@")[0] for name in bundle.state}
    assert log.heads == plain.heads
    assert log.sha256(State()) == plain.sha256(State())
    assert log.view().basis.keys() == {*plain.view().basis, *made}
    held = plain.view().beside(made)
    assert all(torch.equal(t, log.view().basis[name]) for name, t in held.basis.items())
    assert held.residuals is plain.view().residuals
    assert plain.view().beside(State()) is plain.view()
