"""One figure for how unlike clients are: against a slow count, and at both ends."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.data import Examples
from fedsb.data.skew import skew_of


def dealt(*hands):
    targets = tuple(label for hand in hands for label in hand)
    starts = [sum(map(len, hands[:i])) for i in range(len(hands))]
    parts = {f"c{i}": tuple(range(start, start + len(hand))) for i, (start, hand) in enumerate(zip(starts, hands, strict=True))}
    return Examples(tuple(map(str, targets)), targets=targets), parts


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6))
def test_skew_is_the_mean_total_variation_of_label_shares(hands):
    everyone = [label for hand in hands for label in hand]
    whole = Counter(everyone)
    expected = sum(
        Fraction(len(hand), len(everyone))
        * sum(abs(Fraction(Counter(hand)[label], len(hand)) - Fraction(whole[label], len(everyone))) for label in range(4))
        / 2
        for hand in hands
    )
    skew = skew_of(*dealt(*hands), labels=tuple("abcd"))
    assert skew.figure == pytest.approx(float(expected), abs=1e-12)
    assert all(sum(row) == pytest.approx(1.0) for row in skew.shares.values())


def test_equal_clients_have_none_and_clients_of_one_label_the_most():
    assert skew_of(*dealt([0, 1], [1, 0], [0, 1, 0, 1]), labels=("a", "b")).figure == 0.0
    assert skew_of(*dealt([0, 0], [1, 1], [2, 2], [3, 3]), labels=tuple("abcd")).figure == pytest.approx(0.75)


def test_a_task_without_classes_is_described_by_its_sizes_alone():
    skew = skew_of(Examples(("a", "b", "c"), targets=(0.5, 1.0, 2.0)), {"x": (0,), "y": (1, 2)}, ())
    assert (skew.figure, skew.line()) == (None, "2 clients hold 3 training examples, 1 to 2 each")
    assert skew.as_dict() == {
        "label_skew": None, "labels": [], "sizes": {"x": 1, "y": 2}, "label_shares": {}, "dealt_by": None, "group_skew": None, "groups": [],
        "group_shares": {}, "size_skew": pytest.approx(1 / 6),
    }  # fmt: skip
