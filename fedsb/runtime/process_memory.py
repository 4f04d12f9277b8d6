"""This process's memory: how it holds large blocks, and how much there still is."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_FROM = (2**30, 2**25)  # the first is refused by older versions
HEAP_BYTES = 2**30  # what the heap is made ready for
BLOCK = 2**25 - 2**16  # no mapping of its own either way
HUGE = 2**21
# A container's limit, and what it uses, in cgroups of version 2 and 1.
CGROUPS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def available_bytes(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the bytes that this process can still take: of the machine's, or of a container's around it that has a lower limit."""
    return int(min([psutil.virtual_memory().available, *(_left(folder) for folder in _cgroups(cgroups, own))]))


def _cgroups(root: Path, own: Path) -> Iterator[Path]:
    """Yield the cgroups that count this process's memory; seen from inside a container the innermost is the root."""
    yield from (root, root / "memory")
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if "memory" in controllers.split(",") or not controllers:
            inner = (root / "memory" if controllers else root) / path.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _left(cgroup: Path) -> float:
    for limit, used in CGROUPS:
        with suppress(OSError, ValueError):  # another version, or no limit ("max")
            rows = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
            cached = max(int(rows.get(prefix + "inactive_file", 0)) + int(rows.get(prefix + "active_file", 0)) for prefix in ("", "total_"))
            return max(0, int((cgroup / limit).read_text()) - int((cgroup / used).read_text()) + cached)
    return math.inf


def keep_large_blocks(device: torch.device) -> None:
    """Let this process keep the memory of one pass for the next, where it computes on the CPU, on huge pages if the system has them.

    By itself glibc hands blocks as large as a batch's activations back to the system at once, so that every pass faults its pages in
    again; and of small pages activations need more than a processor keeps the addresses of. The heap grows by a GiB of addresses for
    this: they take next to no memory until something is written to them, though a system that does not overcommit counts them.
    """
    if device.type == "cpu":
        _keep()


@cache
def _keep() -> None:
    libc = ctypes.CDLL(None)
    if getattr(libc, "mallopt", None) is None:
        return
    any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in MMAP_FROM)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    with suppress(AttributeError):  # madvise, and the constant for it
        _ask_for_huge_pages(libc, mmap.MADV_HUGEPAGE)


def _ask_for_huge_pages(libc: ctypes.CDLL, advice: int) -> None:
    """Let the heap grow, and free what it grew by: glibc asks nobody for huge pages once a process has begun."""
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = [block for block in (libc.malloc(BLOCK) for _ in range(HEAP_BYTES // BLOCK)) if block]
    if blocks and max(blocks) + BLOCK - min(blocks) <= HEAP_BYTES:  # side by side, so that nothing but the heap lies between
        begin = -(-min(blocks) // HUGE) * HUGE
        libc.madvise(begin, (max(blocks) + BLOCK - begin) // HUGE * HUGE, advice)
    for block in blocks:
        libc.free(block)
