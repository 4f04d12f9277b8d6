"""Laws of named tensors: order, packing, sums and hashes."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State, WeightedSum, non_finite, pack, sha256, squared_norm, subtract, unpack

law = settings(max_examples=25, deadline=None)
names = st.tuples(st.sampled_from(["a", "a.b", "a-b", "z", "encoder.0", "encoder.10"]), st.sampled_from(["A", "B", "R", HEAD]))
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(names, shapes, max_size=8)


def state_of(layout: dict[tuple[str, str], tuple[int, ...]], seed: int = 0) -> State:
    """Return Gaussian tensors of the given shapes."""
    return State({Name(*name): torch.randn(shape, generator=torch_generator(seed, "test", *name)) for name, shape in layout.items()})


@law
@given(layouts, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_how_a_state_was_built(layout: dict[tuple[str, str], tuple[int, ...]], random: object) -> None:
    state = state_of(layout)
    shuffled = list(state.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again = State(shuffled)
    assert list(again) == sorted(layout)
    assert sha256(again) == sha256(state)
    assert all(torch.equal(left, right) for left, right in zip(pack(again).values(), pack(state).values(), strict=True))


@law
@given(layouts)
def test_unpacking_undoes_packing(layout: dict[tuple[str, str], tuple[int, ...]]) -> None:
    state = state_of(layout)
    again = unpack(pack(state), Layout.of(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], t) and again[name].shape == t.shape for name, t in state.items())
    assert Layout.of(state).numel == state.numel == sum(flat.numel() for flat in pack(state).values())


def test_packing_is_one_flat_tensor_a_group_in_sorted_order() -> None:
    state = State(
        {
            Name("b", "A"): torch.tensor([[5.0]]),
            Name("a", "R"): torch.tensor([[3.0, 4.0]]),
            Name("a", "A"): torch.tensor([1.0, 2.0]),
            Name("z", HEAD): torch.tensor(6.0),
        }
    )
    assert {group: flat.tolist() for group, flat in pack(state).items()} == {"trained": [1, 2, 3, 4, 5], "head": [6]}
    assert state.modules == ["a", "b"]


@pytest.mark.parametrize(
    ("flats", "message"),
    [
        ({"trained": torch.zeros(4)}, r"groups are \['trained'\], expected \['head', 'trained'\]"),
        ({"trained": torch.zeros(5), "head": torch.zeros(1)}, r"group 'trained' holds 5 values, expected 4"),
    ],
)
def test_unpacking_says_what_does_not_fit(flats: dict[str, torch.Tensor], message: str) -> None:
    layout = Layout.of(State({Name("a", "R"): torch.zeros(2, 2), Name("c", HEAD): torch.zeros(1)}))
    with pytest.raises(ValueError, match=message):
        unpack(flats, layout)


@law
@given(layouts, layouts)
def test_digests_are_equal_exactly_where_layouts_are(
    left: dict[tuple[str, str], tuple[int, ...]], right: dict[tuple[str, str], tuple[int, ...]]
) -> None:
    one, other = Layout.of(state_of(left)), Layout.of(state_of(right))
    same = dict(one.shapes) == dict(other.shapes)
    assert (one.digest == other.digest) == same == (one.difference(other) is None)
    assert 0 <= one.digest < 2**48


def test_a_difference_names_the_first_entry_that_differs() -> None:
    mine = Layout.of(State({Name("a", "R"): torch.zeros(2, 2), Name("b", "R"): torch.zeros(2, 2)}))
    other = Layout.of(State({Name("a", "R"): torch.zeros(2, 2), Name("b", "R"): torch.zeros(4, 1)}))
    assert mine.difference(other) == "R of 'b' is (4, 1), expected (2, 2)"
    assert mine.difference(Layout.of(State({Name("b", "R"): torch.zeros(2, 2)}))) == "R of 'a' is absent, expected (2, 2)"


@law
@given(st.lists(st.tuples(st.integers(0, 99), st.floats(0.01, 1e4)), min_size=1, max_size=6), st.floats(0.01, 100))
def test_a_weighted_mean_is_that_of_a_slow_loop(terms: list[tuple[int, float]], factor: float) -> None:
    """Scaling all weights, or the order of the terms, moves a float64 sum by its rounding at most."""
    layout = {("a", "R"): (3, 2), ("b", HEAD): (4,)}
    straight, scaled = WeightedSum(), WeightedSum()
    for seed, weight in terms:
        straight.add(state_of(layout, seed), weight)
    for seed, weight in reversed(terms):
        scaled.add(state_of(layout, seed), weight * factor)
    total = sum(weight for _, weight in terms)
    for name, mean in straight.mean().items():
        slow = sum(state_of(layout, seed)[name].double() * (weight / total) for seed, weight in terms)
        assert mean.dtype == torch.float64
        assert torch.allclose(mean, slow, rtol=1e-12, atol=1e-12)
        assert torch.allclose(mean, scaled.mean()[name], rtol=1e-12, atol=1e-12)


def test_a_mean_of_nothing_and_a_sum_of_unlike_states_are_refused() -> None:
    total = WeightedSum()
    with pytest.raises(ValueError, match="at least one state with a positive weight"):
        total.mean()
    total.add(state_of({("a", "R"): (2, 2)}), 1.0)
    with pytest.raises(ValueError, match="states differ: R of 'a' is absent, expected"):
        total.add(state_of({("b", "R"): (2, 2)}), 1.0)


def test_a_sum_does_not_keep_hold_of_its_terms() -> None:
    term = State({Name("a", "R"): torch.ones(2, dtype=torch.float64)})
    total = WeightedSum()
    total.add(term, 1.0)
    total.add(term, 1.0)
    assert term[Name("a", "R")].tolist() == [1.0, 1.0]
    assert total.mean()[Name("a", "R")].tolist() == [1.0, 1.0]


def test_the_hash_is_over_little_endian_float32_in_sorted_order() -> None:
    state = State({Name("b", "R"): torch.tensor([3.0], dtype=torch.float64), Name("a", "R"): torch.tensor([[1.0, 2.0]]).T})
    assert sha256(state, State()) == hashlib.sha256(struct.pack("<3f", 1.0, 2.0, 3.0)).hexdigest()


@law
@given(layouts)
def test_norms_and_differences_are_those_of_the_values(layout: dict[tuple[str, str], tuple[int, ...]]) -> None:
    left, right = state_of(layout, 1), state_of(layout, 2)
    slow = sum(float(v) ** 2 for t in left.values() for v in t.double().flatten())
    assert squared_norm(left) == pytest.approx(slow, rel=1e-12)
    assert all(torch.equal(t, left[name] - right[name]) for name, t in subtract(left, right).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_name_that_is_not_finite_is_found(value: float) -> None:
    state = State({Name(m, "R"): torch.full((2,), value if m != "a" else 0.0) for m in ("c", "b", "a")})
    assert non_finite(state) == Name("b", "R")
    assert non_finite(state.map(torch.zeros_like)) is None


def test_parts_and_unions() -> None:
    state = state_of({("a", "A"): (2,), ("a", "R"): (2,), ("h", HEAD): (1,)})
    assert list(state.pick("R", HEAD)) == [("a", "R"), ("h", HEAD)]
    other = State({Name("a", "R"): torch.zeros(2), Name("b", "R"): torch.zeros(2)})
    merged = state.merge(other)
    assert list(merged) == [("a", "A"), ("a", "R"), ("b", "R"), ("h", HEAD)]
    assert merged[Name("a", "R")] is other[Name("a", "R")]
