"""How far long work is: who does it counts, and who shows it listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Counter = Callable[[str, int, int], None]
_COUNTER: ContextVar[Counter | None] = ContextVar("counter", default=None)


@contextmanager
def counted_by(counter: Counter | None) -> Iterator[None]:
    """Tell ``counter`` what is counted inside the block, in this thread; None tells nobody.

    Args:
        counter: takes what is counted, how many are done, and how many there are in all.
    """
    before = _COUNTER.set(counter)
    try:
        yield
    finally:
        _COUNTER.reset(before)


def count(what: str, done: int, total: int) -> None:
    """Say how many of something are done, to whoever listens."""
    if (counter := _COUNTER.get()) is not None:
        counter(what, done, total)
