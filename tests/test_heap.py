"""A process that trains a stack keeps its memory, on huge pages where there are any, and takes none beforehand."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOOK = """
import ctypes, psutil
from pathlib import Path
from fedsb.heap import keep_large_blocks

process = psutil.Process()
before = process.memory_info().rss
keep_large_blocks()
taken = process.memory_info().rss - before
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
places = []
for _ in range(3):
    places.append(libc.malloc(64 * 2**20))
    ctypes.memset(places[-1], 1, 64 * 2**20)
    libc.free(places[-1])
kept = process.memory_info().rss - before
huge = sum(int(line.split()[1]) for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("AnonHugePages:"))
print(taken, kept, len(set(places)), huge)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_blocks_are_kept_and_lie_on_huge_pages() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, timeout=60)
    taken, kept, places, huge = map(int, done.stdout.split())
    assert taken < 8 * 2**20
    assert kept >= 60 * 2**20
    assert places == 1
    if THP.is_file() and "[never]" not in THP.read_text():
        assert huge >= 32 * 2**10
