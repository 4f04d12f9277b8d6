"""Files that outlive a kill and a loss of power: they appear whole, grow by whole lines, and their names reach the disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4


def reason_of(error: Exception) -> str:
    """Say in half a line what the machine did not let happen, and where; empty for what is no error of a file.

    safetensors reports an error of the system as a text with its number.
    """
    found = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number is None:
        return ""
    place = getattr(error, "filename", None)
    return f"{os.strerror(number).lower()}{f' ({place})' if place else ''}"


def is_full(error: Exception) -> bool:
    """Tell whether an error is of a disk without room."""
    return reason_of(error).startswith(tuple(os.strerror(number).lower() for number in (errno.ENOSPC, errno.EDQUOT)))


def create_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Make a file that is not there yet: nobody sees a part of it, and of several who try one succeeds.

    Args:
        path: of the file.
        text: all that it holds.
        mode: its permissions, less what the process masks.

    Raises:
        FileExistsError: it is there.
    """
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with open(scratch, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
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
        path.touch(mode=0o600, exist_ok=False)
        scratch.replace(path)


def replace_whole(path: Path, content: bytes | str) -> None:
    """Write a file in place of what is there: a reader sees the old one or the new one, and of several writers the last one counts."""
    scratch = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        with scratch.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path, *, mode: int = 0o700) -> None:
    """Make a folder with a mode, and those above it, and bring each new name to the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    for each in missing:
        sync_folder(each.parent)


@contextmanager
def private_files() -> Iterator[None]:
    """Let what the process makes inside the block, all its threads', be nobody else's to read, write or list."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def append_line(file: BinaryIO, record: Mapping[str, Any]) -> None:
    """Append a record to a file of lines, which :func:`locked` gave; when this returns it is on the disk."""
    file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


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
