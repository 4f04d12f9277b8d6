"""Layers are cut where the fullest GPU is as empty as can be: held against all cuts that there are."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.models.cards import MOST, cut

GIB = 2**30


def fullest(where: tuple[int, ...] | list[int], layers: list[int], first: int, rooms: list[int]) -> float:
    """Return the share that is taken of the fullest GPU."""
    held = [first, *[0] * (len(rooms) - 1)]
    for card, size in zip(where, layers, strict=True):
        held[card] += size
    return max(size / room for size, room in zip(held, rooms, strict=True))


@given(
    layers=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    first=st.integers(0, 60),
    rooms=st.lists(st.integers(20, 120), min_size=1, max_size=3),
)
def test_no_other_cut_leaves_the_fullest_gpu_emptier(layers: list[int], first: int, rooms: list[int]) -> None:
    every = combinations_with_replacement(range(len(rooms)), len(layers))
    least = min(fullest(where, layers, first, rooms) for where in every)
    if least > MOST:
        with pytest.raises(UserError, match=r"^model\.device_map=auto: the model takes "):
            cut(layers, first, rooms)
        return
    found = cut(layers, first, rooms)
    assert found == sorted(found)
    if first + sum(layers) <= MOST * rooms[0]:
        assert found == [0] * len(layers)
    else:
        assert fullest(found, layers, first, rooms) == pytest.approx(least, rel=1e-6)


def test_a_small_card_gets_fewer_layers_and_the_first_one_room_for_the_embedding() -> None:
    alike = cut([GIB] * 12, 2 * GIB, [10 * GIB, 10 * GIB])
    assert [alike.count(card) for card in range(2)] == [5, 7]
    small = cut([GIB] * 12, 2 * GIB, [15 * GIB, 5 * GIB])
    assert [small.count(card) for card in range(2)] == [9, 3]


def test_what_does_not_fit_is_said_with_what_there_is() -> None:
    with pytest.raises(UserError) as said:
        cut([GIB] * 30, 2 * GIB, [10 * GIB, 20 * GIB])
    assert "takes 32.0 GiB, 2.0 of them on the first GPU and the rest in 30 layers" in str(said.value)
    assert "10.0, 20.0 GiB" in str(said.value)
    assert "model.quantize=int4" in str(said.value)
