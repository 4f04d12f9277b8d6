"""Python's garbage collector, left out while a process imports and builds what it keeps to its end.

It looks through everything that is there again and again while more comes: a sixth of the time that torch, transformers and a model take
to be there, in each process.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def release_memory() -> None:
    """Give back what a finished run has left for the next one of a sweep, or a large round for the next.

    A strategy and its rule hold each other, so that their tensors wait for Python's collector, which counts objects and not bytes; and what
    the heap keeps is full of holes, of which the next blocks need not fit into any.
    """
    gc.collect()
    with suppress(AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
