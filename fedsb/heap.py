"""How this process holds large blocks of memory, where the C library is glibc."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_FROM = 2**30
HEAP_BYTES = MMAP_FROM - 2**16  # what the heap is made ready for, as one block that is still no mapping of its own
HUGE = 2**21


@cache
def keep_large_blocks() -> None:
    """Let this process keep the memory of one pass for the next, on huge pages where the system gives them to those who ask.

    By itself glibc hands blocks as large as a stack's activations back to the system at once, so that every pass faults its pages in
    again; and of small pages activations need more than a processor keeps the addresses of. Nothing is taken before it is written to.
    """
    libc = ctypes.CDLL(None)
    if getattr(libc, "mallopt", None) is None:
        return
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_FROM)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    with suppress(AttributeError):  # madvise, and the constant for it
        _ask_for_huge_pages(libc, mmap.MADV_HUGEPAGE)


def _ask_for_huge_pages(libc: ctypes.CDLL, advice: int) -> None:
    """Let the heap grow, and free what it grew by: glibc asks nobody for huge pages once a process has begun."""
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(HEAP_BYTES)
    if block:
        begin = -(-block // HUGE) * HUGE
        libc.madvise(begin, (block + HEAP_BYTES - begin) // HUGE * HUGE, advice)
        libc.free(block)
