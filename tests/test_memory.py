"""A process that trains a stack keeps its memory, on huge pages where there are any; what it may take is a container's too."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedsb.memory import available_bytes

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOOK = """
import ctypes, psutil
from pathlib import Path
from fedsb.memory import keep_large_blocks

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


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"memory.max": "3000", "memory.current": "2500", "memory.stat": "anon 2000\ninactive_file 400\n"}, 900),
        ({"memory.max": "3000", "memory.current": "3100", "memory.stat": "anon 3100\n"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "700",
                "memory/memory.usage_in_bytes": "600",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            150,
        ),
    ],
    ids=["2", "2, full", "1"],
)
def test_a_container_s_limit_counts(files: dict[str, str], wanted: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == wanted


@pytest.mark.parametrize("text", ["max", str(2**60)])
def test_without_a_lower_limit_it_is_the_machine_s(text: str, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text(text)
    (tmp_path / "memory.current").write_text("1")
    (tmp_path / "memory.stat").write_text("")
    assert available_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
