"""Which files of a cache of the frozen log say nothing any more that later ones do not."""

from __future__ import annotations

from collections.abc import Mapping

from fedsb.core.state import Name
from fedsb.wire.frozen import ADDED

Versions = Mapping[Name, int]  # of what a file holds, by its name without the version


def superseded(files: Mapping[str, Versions], keep: int) -> set[str]:
    """Return the heads of files all of whose factors have a later version in the oldest of the last ``keep`` files, or before it.

    What adds to the frozen weights is never superseded.
    """
    latest = {head: max(versions.values(), default=0) for head, versions in files.items()}
    last = sorted(latest.values())[-keep:]
    reach = last[0] if len(latest) > keep else 0
    counts: dict[Name, int] = {}
    for versions in files.values():
        for name, version in versions.items():
            if version <= reach:
                counts[name] = max(version, counts.get(name, 0))
    return {
        head
        for head, versions in files.items()
        if latest[head] < reach and all(name.role not in ADDED and version < counts[name] for name, version in versions.items())
    }
