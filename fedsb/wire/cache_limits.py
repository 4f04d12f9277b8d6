"""How much a cache on disk may keep: files that nobody has used for long go, and the oldest where all together are too large.

A file that is missed later costs a message, so nothing is asked but when it was used last.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DAY, GB = 86400, 10**9
PAUSE_S = 3600  # between two looks at a folder


@dataclass(frozen=True)
class Limits:
    """Of a folder of files: days since each was used, and gigabytes (10⁹ bytes) of all together; None: no limit."""

    days: float | None = None
    gb: float | None = None


def mark_used(path: Path) -> None:
    """Note that a file is in use, where the disk lets it be."""
    with suppress(OSError):
        os.utime(path)


def prune(folder: Path, limits: Limits, spared: Collection[Path] = (), now: float | None = None) -> list[Path]:
    """Remove what exceeds the limits, and return what was removed.

    Args:
        folder: its files alone, not those of folders in it.
        limits: of age and size.
        spared: files that stay, but count.
        now: seconds since the epoch; None: the clock's.
    """
    found = sorted((stat.st_mtime, stat.st_size, path) for path in folder.iterdir() if (stat := _stat(path)) is not None)
    now, total, gone = time.time() if now is None else now, sum(size for _, size, _ in found), []
    for used, size, path in found:
        too_old = limits.days is not None and now - used > limits.days * DAY
        too_much = limits.gb is not None and total > limits.gb * GB
        if (too_old or too_much) and path not in spared:
            with suppress(OSError):
                path.unlink()
                gone.append(path)
                total -= size
    return gone


def _stat(path: Path) -> os.stat_result | None:
    """Return what is known of a file; None for a folder, and for what another process has removed meanwhile."""
    with suppress(OSError):
        return path.stat() if path.is_file() else None
    return None
