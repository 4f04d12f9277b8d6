"""SIGTERM ends a command as Ctrl-C does: what is open is closed, and a line says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever cleans up after Ctrl-C does so after this."""


def how_ended(error: KeyboardInterrupt) -> str:
    """Say what ended a command."""
    return "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` where SIGTERM finds the block, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    heed_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def heed_sigterm() -> None:
    """Take the signal (again): Ray sets a handler of its own when it starts, which ends the process on the spot."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    # A second one would cut off what the first one set off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
