"""Room for a step of constant time: as much as any sample needs, but with a probability that is none, and a function of n and q alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from clients.physical import OVERFLOW, Room, filled


@given(st.integers(1, 5_000), st.floats(1e-6, 1.0), st.integers(1, 64))
def test_room_holds_any_sample_but_one_in_a_trillion(count: int, rate: float, max_batch: int) -> None:
    room = Room.of(count, rate, max_batch)
    held = room.batches * room.rows
    assert room.rows <= max_batch
    assert binom.sf(held, count, rate) <= OVERFLOW * (1 + 1e-6)
    # No more than needed: half of it would be too little, but for what rounding to whole batches adds.
    assert held <= count + room.batches
    assert room.batches == 1 or binom.sf(held - room.batches - 1, count, rate) > 0.5 * OVERFLOW


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 7))
def test_a_sample_is_cut_into_all_of_the_room(drawn: int, batches: int, rows: int) -> None:
    """And goes on where it ends."""
    pieces = Room(batches, rows).split(range(drawn))
    assert [i for piece in pieces for i in piece] == list(range(drawn))
    assert all(len(piece) <= rows for piece in pieces)
    assert len(pieces) == max(batches, -(-drawn // rows))
    each = [filled([{"input_ids": [i]} for i in piece], {"input_ids": [-1]}, rows) for piece in pieces]
    assert all(len(asked) == rows and asked.counted == len(piece) for asked, piece in zip(each, pieces, strict=True))
