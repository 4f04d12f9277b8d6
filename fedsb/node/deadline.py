"""The time that a message may take, held from outside of what answers it.

What is late gets an exception between two steps of Python, wherever it is: nothing has to ask for the time. What was charged to the ledger
before stays charged, as it would if the process had been killed. What does not come back to Python at all is not ended.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeOver(BaseException):
    """A message took longer than the operator of the node allows.

    No ``Exception``: whoever passes over what is wrong with one row must not take it for that.
    """

    def __init__(self, seconds: float | None = None) -> None:
        super().__init__("the time is over" if seconds is None else f"limits.max_seconds of this node is {seconds:g}, and the time is over")


@contextmanager
def within(seconds: float | None) -> Iterator[None]:
    """End the block with :class:`TimeOver` where it takes longer; None lets it take as long as it likes."""
    if seconds is None:
        yield
        return
    here, lock, over = threading.get_ident(), threading.Lock(), [False, False]  # whether the block is over, whether its time is

    def end() -> None:
        with lock:
            if not over[0]:
                over[1] = True
                _raise_in(here, TimeOver)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except TimeOver:
        raise TimeOver(seconds) from None
    finally:
        timer.cancel()
        with lock:
            over[0] = True
            if over[1]:
                _raise_in(here, None)  # what was not raised yet shall not be raised in what comes next


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Let a thread raise an exception as soon as it runs Python again; None takes one back that it has not raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None if kind is None else ctypes.py_object(kind))
