"""Python's garbage collector, left out while a process imports and builds what it keeps to its end.

It looks through everything that is there again and again while more comes: a sixth of the time that torch, transformers and a model take
to be there, in each process.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedsb.core.signals import raise_swallowed

_LOCK = threading.Lock()
_paused = 0  # blocks that are open, in all threads: Flower's simulation imports the two apps in two
_was_on = True


@contextmanager
def uncollected() -> Iterator[None]:
    """Let nothing be collected inside the block, nor a signal be lost that an import there has swallowed; also a decorator."""
    global _paused, _was_on
    with _LOCK:
        if not _paused:
            _was_on = gc.isenabled()
            gc.disable()
        _paused += 1
    try:
        yield
    finally:
        with _LOCK:
            _paused -= 1
            if not _paused and _was_on:
                gc.enable()
    raise_swallowed()
