r"""The content of a model by a hash that anybody can compute: of its files' bytes and names, whatever its folder is called.

Of a single file (``.gguf``) it is the file's SHA-256. Of a folder it is the SHA-256 of what ``sha256sum`` says of its files, in the order
of their names' bytes, but for hidden ones and ``__pycache__``. In a shell, in that folder:

    find -L . -type f -not -path '*/.*' -not -path '*/__pycache__/*' -printf '%P\n' | LC_ALL=C sort | xargs -d '\n' sha256sum | sha256sum
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedsb.core.disk import locked, make_folder, replace_whole
from fedsb.core.errors import UserError

KEPT = "model_hashes.json"
Stamp = list[tuple[str, int, int, int]]  # name, bytes, and when content and entry were changed last, in nanoseconds


def content_hash(place: Path, kept: Path | None = None) -> str:
    """Return the hash of a model's folder or file, 64 hexadecimal digits.

    Args:
        place: the folder or file; links are followed.
        kept: a folder that keeps hashes of earlier calls: a file that has its size and times is not read again.

    Raises:
        UserError: nothing is there, there is no file in it, one cannot be read, or one has a name that ``sha256sum`` would write otherwise.
    """
    try:
        stamp = list(_stamps(place))
        known = _known(kept)
        name, told = str(place.resolve()), [list(each) for each in stamp]
        if kept is None or known.get(name, {}).get("files") != told:
            found = _computed(place, [each[0] for each in stamp])
            if kept is not None and [list(each) for each in _stamps(place)] == told:
                _keep(kept, name, {"files": told, "sha256": found})
            return found
        return str(known[name]["sha256"])
    except OSError as error:
        raise UserError(f"'{place}' can't be read as a model ({(error.strerror or '').lower()}: {error.filename})") from None


def _stamps(place: Path) -> Iterator[tuple[str, int, int, int]]:
    found = [place] if place.is_file() else list(_files(place))
    names = {os.fsencode(path.relative_to(place) if path != place else path.name): path for path in found}
    if not names:
        raise UserError(f"'{place}' holds no files; give the folder or the file of a model")
    for name, path in sorted(names.items()):
        stat = path.stat()
        text = os.fsdecode(name)
        if "\n" in text or "\\" in text or "\r" in text:
            raise UserError(f"'{place}' holds a file whose name has a line feed or a backslash; rename it")
        yield text, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith(".") and each != "__pycache__"]
        yield from (path for each in files if not each.startswith(".") and (path := Path(root) / each).is_file())


def _computed(place: Path, names: list[str]) -> str:
    if place.is_file():
        return _sha256(place)
    told = hashlib.sha256()
    for name in names:
        told.update(f"{_sha256(place / name)}  ".encode() + os.fsencode(name) + b"\n")
    return told.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _known(kept: Path | None) -> dict[str, Any]:
    if kept is None:
        return {}
    with suppress(OSError, ValueError):  # one that is not there, or was cut off, costs computing the hash again
        found = json.loads((kept / KEPT).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _keep(kept: Path, name: str, entry: dict[str, Any]) -> None:
    with suppress(OSError):
        make_folder(kept)
        with locked(kept / f"{KEPT}.lock"):
            replace_whole(kept / KEPT, json.dumps({**_known(kept), name: entry}))
