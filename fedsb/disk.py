"""Files that outlive a kill and a loss of power: they appear whole, grow by whole lines, and their names reach the disk."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
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


@contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read it and to append to it, made if need be, and keep all others who lock it waiting inside the block."""
    with path.open("a+b") as file:
        # Closing releases it, as does the death of the process.
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def cut_torn(file: BinaryIO) -> int:
    """Cut off what stands behind the last line feed, and return what remains, in bytes."""
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    return whole


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a new one outlives a crash once its folder is there."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
