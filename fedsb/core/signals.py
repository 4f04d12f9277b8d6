"""SIGTERM ends a command as Ctrl-C does: what is open is closed, and a line says how to go on.

Libraries that look whether another one is there swallow whatever is raised while they import it, a signal too. :func:`raise_swallowed`
raises it again behind such a block.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever cleans up after Ctrl-C does so after this."""


_came: list[type[KeyboardInterrupt]] = []  # signals since the command began


def how_ended(error: KeyboardInterrupt) -> str:
    """Say what ended a command; with that the signal has been heard."""
    _came.clear()
    return "ended by SIGTERM" if isinstance(error, Terminated) else "interrupted"


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Raise :class:`Terminated` where SIGTERM finds the block, once, and KeyboardInterrupt where Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    heed_sigterm()
    if interrupt is signal.default_int_handler:  # it is ignored in the background of a shell
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupt or signal.SIG_DFL)
        _came.clear()


def heed_sigterm() -> None:
    """Take the signal (again): Ray sets a handler of its own when it starts, which ends the process on the spot."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    # A second one would cut off what the first one set off.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _came.append(Terminated)
    raise Terminated


def _interrupt(number: int, frame: FrameType | None) -> None:
    _came.append(KeyboardInterrupt)
    raise KeyboardInterrupt


def raise_swallowed() -> None:
    """Raise what a signal has raised before, where the command goes on as if none had come."""
    if _came and threading.current_thread() is threading.main_thread():
        raise _came[0]
