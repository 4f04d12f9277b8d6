"""Salted hashes of a data set's rows: by them a node notices the same rows at another place, and a reader learns none of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsb.core.disk import create_whole, locked

Hashes = NDArray[np.uint64]
SALT_BYTES, HASH_BYTES = 32, 8
KIND = np.dtype("<u8")


def read_salt(path: Path) -> bytes:
    """Return the salt of a home, made by who comes first, from the operating system; it is for the owner alone."""
    if not path.is_file():
        with suppress(FileExistsError):
            create_whole(path, os.urandom(SALT_BYTES).hex() + "\n", mode=0o600)
    return bytes.fromhex(path.read_text(encoding="utf-8"))


def hash_rows(texts: Sequence[str], pairs: Sequence[str] | None, salt: bytes) -> Hashes:
    """Return the hashes of rows, sorted and each once.

    A row is what the model reads of it: whichever label it is given, it is the same person's. A row without any text is nobody's.
    """
    rows = ((text, pair) for text, pair in zip(texts, pairs or repeat(""), strict=False) if text.strip() or pair.strip())
    found = b"".join(_hash(text, pair, salt) for text, pair in rows)
    return np.unique(np.frombuffer(found, KIND))


def _hash(text: str, pair: str, salt: bytes) -> bytes:
    content = f"{len(text)}|{text}{pair}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=HASH_BYTES, key=salt).digest()


def read_hashes(path: Path) -> Hashes:
    """Return what :func:`add_hashes` left; a hash that was cut off at a crash is left out."""
    content = path.read_bytes() if path.is_file() else b""
    return np.frombuffer(content[: len(content) // HASH_BYTES * HASH_BYTES], KIND)


def add_hashes(path: Path, fresh: Hashes) -> None:
    """Append hashes; when this returns they are on the disk."""
    with locked(path) as file:
        file.truncate(file.seek(0, os.SEEK_END) // HASH_BYTES * HASH_BYTES)
        file.write(fresh.astype(KIND).tobytes())
        file.flush()
        os.fsync(file.fileno())
