"""A message's time is held whatever it is at, and what comes after it is left alone."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest

from fedsb.node.deadline import TimeOver, within


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(Exception):  # as whoever passes over what is wrong with a row
            sum(range(100))


def test_what_is_late_is_ended_and_no_handler_of_faults_swallows_it() -> None:
    began = time.monotonic()
    with pytest.raises(TimeOver, match=r"^limits.max_seconds of this node is 0.05, and the time is over$"), within(0.05):
        busy(20)
    assert time.monotonic() - began < 10


def test_what_is_in_time_is_left_alone_afterwards() -> None:
    for _ in range(20):
        with within(0.01):
            busy(0.002)
    busy(0.05)
    with within(None):
        busy(0.01)


def test_blocks_that_end_when_their_time_does_leave_nothing_behind() -> None:
    """An exception that was on its way belongs to the block or to nobody."""
    for i in range(200):
        with suppress(TimeOver), within(0.001):
            busy(0.0005 + i * 5e-6)
        busy(0.0002)
