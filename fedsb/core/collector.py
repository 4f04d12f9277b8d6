"""Python's garbage collector, left out while a process imports and builds what it keeps to its end.

It looks through everything that is there again and again while more comes: a sixth of the time that torch, transformers and a model take
to be there, in each process.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from fedsb.core.signals import raise_swallowed

_LOCK = threading.Lock()
_paused = 0  # blocks that are open, in all threads: Flower's simulation imports the two apps in two
_was_on = True
_for_good = False  # whether what one of them imports stays to the end
_modules = 0  # there before the first of them


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Let nothing be collected inside the block, nor a signal be lost that an import there has swallowed; also a decorator.

    Args:
        for_good: where modules are imported inside, what there is behind the last block stays to the process's end, and is never looked
            through again: a single pass over torch and transformers takes half a second.
    """
    global _paused, _was_on, _for_good, _modules
    with _LOCK:
        if not _paused:
            _was_on, _for_good, _modules = gc.isenabled(), False, len(sys.modules)
            gc.disable()
        _paused += 1
        _for_good |= for_good
    try:
        yield
    finally:
        with _LOCK:
            _paused -= 1
            if not _paused:
                _resume()
    raise_swallowed()


def _resume() -> None:
    if _for_good and len(sys.modules) > _modules:
        gc.freeze()
    if _was_on:
        gc.enable()


def release_memory() -> None:
    """Give back what a finished run has left for the next one of a sweep, or a large round for the next.

    A strategy and its rule hold each other, so that their tensors wait for Python's collector, which counts objects and not bytes; and what
    the heap keeps is full of holes, of which the next blocks need not fit into any.
    """
    gc.collect()
    with suppress(AttributeError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
