"""Files that outlive a kill and a loss of power: they appear whole, and their names reach the disk."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def create_whole(path: Path, text: str) -> None:
    """Make a file that is not there yet: nobody sees a part of it, and of several who try one succeeds.

    Raises:
        FileExistsError: it is there.
    """
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _name(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def _name(scratch: Path, path: Path) -> None:
    try:
        os.link(scratch, path)
    except FileExistsError:
        raise
    except OSError:  # the file system knows no hard links
        path.touch(exist_ok=False)
        scratch.replace(path)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a new one outlives a crash once its folder is there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
