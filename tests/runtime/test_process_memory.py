"""A process that trains on the CPU keeps its memory, on huge pages where there are any; what it may take is a container's too."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedsb.core.collector import release_memory
from fedsb.runtime.process_memory import available_bytes

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOOK = """
import ctypes, psutil, torch
from pathlib import Path
from fedsb.runtime.process_memory import keep_large_blocks

process = psutil.Process()
before = process.memory_info().rss
keep_large_blocks(torch.device("cpu"))
taken = process.memory_info().rss - before
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
places = []
for _ in range(3):
    places.append(libc.malloc(24 * 2**20))
    ctypes.memset(places[-1], 1, 24 * 2**20)
    libc.free(places[-1])
kept = process.memory_info().rss - before
asked = any(line.startswith("VmFlags:") and " hg" in line for line in Path("/proc/self/smaps").read_text().splitlines())
print(taken, kept, len(set(places)), int(asked))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_blocks_are_kept_and_ask_for_huge_pages() -> None:
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True, timeout=60)
    taken, kept, places, asked = map(int, done.stdout.split())
    # Where all get huge pages unasked, the head of each block that the heap grows by may take one.
    assert taken < (80 if "[always]" in (THP.read_text() if THP.is_file() else "") else 8) * 2**20
    assert kept >= 23 * 2**20
    assert places == 1
    assert asked == THP.is_file()


V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
V2 = "memory.max", "memory.current"


def limit(folder: Path, names: tuple[str, str], most: str, used: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(most + "\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """What stands in /proc/self/cgroup."""
    path = tmp_path / "cgroup"
    path.write_text("4:cpu,cpuacct:/jobs\n3:memory:/jobs/7\n0::/slice/job 7\n")
    return path


class Ring:
    """Holds memory, and itself."""

    def __init__(self) -> None:
        self.me = self
        self.blocks = [bytearray(4096) for _ in range(30_000)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_holds_itself_is_given_back_to_the_system() -> None:
    process, held, pegs = psutil.Process(), 120e6, []
    release_memory()
    before = process.memory_info().rss
    ring = Ring()
    pegs.append(bytearray(4096))  # above it all: the heap can't just be cut
    full = process.memory_info().rss
    del ring
    release_memory()
    assert full - before > 0.8 * held
    assert process.memory_info().rss - before < 0.3 * held


def test_a_limit_of_version_2_counts_and_cached_files_are_free(tmp_path: Path) -> None:
    limit(tmp_path, V2, "3000", 2500, "anon 2000\ninactive_file 300\nactive_file 100\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 900


def test_a_limit_of_version_1_counts(tmp_path: Path) -> None:
    limit(tmp_path / "memory", V1, "700", 600, "inactive_file 1\ntotal_inactive_file 50\n")
    assert available_bytes(tmp_path, tmp_path / "none") == 150


def test_nothing_is_left_beyond_a_limit(tmp_path: Path) -> None:
    limit(tmp_path, V2, "3000", 3100)
    assert available_bytes(tmp_path, tmp_path / "none") == 0


def test_limits_further_in_count_and_the_lowest_decides(tmp_path: Path, own: Path) -> None:
    limit(tmp_path / "slice" / "job 7", V2, "max", 10)
    limit(tmp_path / "slice", V2, "5000", 1000)
    assert available_bytes(tmp_path, own) == 4000
    limit(tmp_path / "memory" / "jobs" / "7", V1, "3000", 1000)
    assert available_bytes(tmp_path, own) == 2000


@pytest.mark.parametrize("most", ["max", str(2**60)])
def test_without_a_lower_limit_it_is_the_machine_s(most: str, tmp_path: Path) -> None:
    limit(tmp_path, V2, most, 1)
    assert available_bytes(tmp_path, tmp_path / "none") == pytest.approx(psutil.virtual_memory().available, rel=0.2)
