"""SIGTERM becomes an exception, once, and the handler before it comes back."""

from __future__ import annotations

import gc
import signal

import pytest

from fedsb.core.collector import uncollected
from fedsb.core.signals import Terminated, heed_sigterm, heeding_sigterm


def test_it_ends_the_block_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as ended, heeding_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.type is Terminated
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_handler_is_replaced_and_a_second_signal_does_not_cut_off_the_first() -> None:
    with heeding_sigterm():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        heed_sigterm()
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_what_an_import_swallows_is_raised_behind_it(number: signal.Signals, raised: type[KeyboardInterrupt]) -> None:
    """As a library does that looks whether another one can be imported; a second SIGTERM would not be heard."""
    went_on: list[str] = []

    def command() -> None:
        with uncollected():
            try:
                signal.raise_signal(number)
            except BaseException:
                went_on.append("in the block")
        went_on.append("behind it")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as ended, heeding_sigterm():
            command()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.type, went_on) == (raised, ["in the block"])
    with uncollected():
        went_on.append("the next command")
    assert gc.isenabled()
