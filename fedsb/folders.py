"""Folders that a user names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from fedsb.errors import UserError


def check_makeable(path: Path, said: str) -> None:
    """Hold that a folder is there or can be made, and leave no trace of the attempt.

    Args:
        path: of the folder.
        said: how the user named it, for the message.

    Raises:
        UserError: a file stands in its way, or the machine does not let it be made.
    """
    found = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if found.exists() and not found.is_dir():
        raise UserError(f"{said}: '{found}' is a file; choose another folder")
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{said}: it can't be made ({error.strerror}); choose another folder") from None
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
