"""A mean over clients of whom some hold a block alone, against one entry after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.blocks import WHOLE, BlockMean, Sight
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State, WeightedSum

M, N, RANK = 5, 4, 3
B, R, A, H = Name("x", "B"), Name("x", "R"), Name("x", "A"), Name("y", HEAD)
ranks = st.integers(1, RANK)


def shapes(rank: int) -> dict[Name, tuple[int, ...]]:
    return {A: (rank, N), B: (M, rank), R: (rank, rank), H: (2,)}


def drawn(rank: int, seed: int) -> State:
    draw = torch_generator(seed, "blocks")
    return State({name: torch.randn(shape, generator=draw) for name, shape in shapes(rank).items()})


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ranks, st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 999))
def test_it_is_the_mean_of_who_holds_an_entry(clients: list[tuple[int, int]], seed: int) -> None:
    current, uploads = drawn(RANK, seed), [drawn(rank, seed + 1 + i) for i, (rank, _) in enumerate(clients)]
    mean = BlockMean()
    for upload, (_, weight) in zip(uploads, clients, strict=True):
        mean.add(upload, float(weight))
    assert mean.total_weight == sum(weight for _, weight in clients)
    found = mean.mean(current)
    assert found.keys() == current.keys()
    for name, whole in current.items():
        for at in torch.cartesian_prod(*(torch.arange(size) for size in whole.shape)).reshape(-1, whole.ndim).tolist():
            place = tuple(at)
            holders = [
                (float(upload[name][place]), weight)
                for upload, (_, weight) in zip(uploads, clients, strict=True)
                if all(i < size for i, size in zip(place, upload[name].shape, strict=True))
            ]
            total = sum(weight for _, weight in holders)
            wanted = sum(value * weight for value, weight in holders) / total if total else float(whole[place])
            assert float(found[name][place]) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_whole_states_have_the_mean_that_they_always_had() -> None:
    plain, mean = WeightedSum(), BlockMean()
    for seed, weight in ((1, 3.0), (2, 0.1), (3, 7.0)):
        for each in (plain, mean):
            each.add(drawn(RANK, seed), weight)
    for name, t in mean.mean(drawn(RANK, 0)).items():
        assert torch.equal(t, plain.mean()[name])


def test_a_mean_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^a mean needs at least one state$"):
        BlockMean().mean(State())


def test_what_is_not_in_a_sight_is_seen_whole() -> None:
    whole, narrow = drawn(RANK, 0), Sight(Layout(tuple(sorted(shapes(2).items()))))
    assert all(WHOLE.of(name, t) is t for name, t in whole.items())
    seen = narrow.state(whole)
    assert torch.equal(seen[B], whole[B][:, :2])
    assert torch.equal(seen[A], whole[A][:2])
    assert torch.equal(seen[R], whole[R][:2, :2])
    assert seen[H] is whole[H]
    other = torch.zeros(7, 7)
    assert narrow.of(Name("x", "U"), other) is other


def test_a_family_may_say_where_a_smaller_rank_lies() -> None:
    """The trailing block, say."""

    def trailing(role: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(slice(-size, None) for size in shape)

    whole = drawn(RANK, 0)
    assert torch.equal(Sight(Layout(((R, (2, 2)),)), trailing).of(R, whole[R]), whole[R][1:, 1:])
    mean = BlockMean(trailing)
    mean.add(drawn(2, 1).pick("R"), 1.0)
    found = mean.mean(whole)[R]
    assert torch.equal(found[1:, 1:], drawn(2, 1)[R].double())
    assert torch.equal(found[0], whole[R][0].double())
