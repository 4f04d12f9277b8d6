"""SIGTERM becomes an exception, once, and the handler before it comes back."""

from __future__ import annotations

import signal

import pytest

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
