"""Folders that a user names."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from uuid import uuid4

from fedsb.core.errors import UserError

ROOT_CONFIG = "config"  # the YAML file that all others hang from


def home() -> Path:
    """Return ``$FEDSB_HOME``, by default ``~/.fedsb``: frozen cache and the folders of runs under Flower.

    Raises:
        UserError: the user has no home, as in some containers.
    """
    try:
        return Path(os.environ.get("FEDSB_HOME") or Path.home() / ".fedsb")
    except RuntimeError:
        raise UserError("this user has no home folder; set FEDSB_HOME to a folder that outlives the run") from None


def conf_dir() -> Path:
    """Return the folder of the YAML files: beside the package in a checkout or a FAB, inside it in a wheel."""
    here = Path(__file__).resolve().parents[1]
    beside = here.parent / "conf"
    return beside if (beside / f"{ROOT_CONFIG}.yaml").is_file() else here / "conf"


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
    if not missing and not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{said}: '{path}' can't be written; choose another folder")


def claim(path: Path) -> Path:
    """Make a folder that was not there: ``path``, or the first of ``path-1``, ``path-2``, … that nobody else has made.

    Raises:
        UserError: the machine does not let it be made.
    """
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(1)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for free in names:
            with suppress(FileExistsError):
                free.mkdir()
                return free
    except OSError as error:
        raise UserError(f"'{path}' can't be made ({error.strerror}); name another folder with output=…") from None
    raise AssertionError("there are always more numbers")


@contextmanager
def filled_whole(path: Path) -> Iterator[Path]:
    """Give a scratch folder whose files come to ``path`` once the block has ended well; what fails leaves ``path`` as it was.

    Args:
        path: a folder, or the place of one. Files that lie in it stay, but for those of the same names.

    Raises:
        OSError: the machine does not let it be written.
    """
    place = path.resolve()
    missing = [folder for folder in place.parents if not folder.exists()]
    # Beside a folder that is there nobody may be allowed to write, or it is a file system of its own.
    scratch = (place if place.is_dir() else place.parent) / f".{place.name}.{uuid4().hex}.part"
    try:
        scratch.mkdir(parents=True)
        yield scratch
        _let_be_read(scratch)
        _bring(scratch, place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _let_be_read(folder: Path) -> None:
    """Give each file the mode that the system gives new ones: safetensors keeps what it writes from everybody else."""
    probe = folder / f".{uuid4().hex}"
    probe.touch()
    usual = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(usual)


def _bring(source: Path, place: Path) -> None:
    """Move a file, or a folder into one that is there, file by file."""
    if not (source.is_dir() and place.is_dir()):
        source.replace(place)
        return
    for each in sorted(source.iterdir()):
        _bring(each, place / each.name)


def forget_empty(folder: Path) -> None:
    """Remove a folder that was made before anyone had looked at what was asked for, and that of its date, where they are empty."""
    with suppress(OSError):
        folder.rmdir()
        if folder.parent.parent.name in ("outputs", "multirun"):
            folder.parent.rmdir()
