"""This process's memory: how it holds large blocks, and how much there still is."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_FROM = 2**30
HEAP_BYTES = MMAP_FROM - 2**16  # what the heap is made ready for, as one block that is still no mapping of its own
HUGE = 2**21
# A container's limit, what it uses, and the row of memory.stat for what it would give back: of cgroups 2 and 1.
CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process can still take: of the machine's, or of its container's where that has a lower limit."""
    free = psutil.virtual_memory().available
    for limit, used, table, row in CGROUPS:
        with suppress(OSError, ValueError):  # no such cgroup, or no limit ("max")
            rows = dict(line.split() for line in (cgroup / table).read_text().splitlines())
            left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text()) + int(rows.get(row, 0))
            free = min(free, max(0, left))
    return int(free)


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
