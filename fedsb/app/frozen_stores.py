"""The caches of frozen parts that a process has open."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fedsb.wire.cache_limits import Limits
from fedsb.wire.frozen_cache import FrozenCache


@lru_cache(maxsize=4)
def store(folder: Path, rank: int | None, as_factors: bool, limits: Limits, owner: str) -> FrozenCache:
    """Return the cache in a folder, of clients of one rank, and of one run where it has an owner."""
    return FrozenCache(folder, rank, as_factors=as_factors, limits=limits, owner=owner)


def forget_stores() -> None:
    """Read them from their disk again where they are asked for next."""
    store.cache_clear()
