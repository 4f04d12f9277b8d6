"""Masks over whole numbers modulo 2^32: AES-256 in counter mode, one key a mask.

Flower's own generator has a seed of 32 bits, which can be guessed, and never draws the largest value.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint32]]"
WORD = 4  # bytes


def mask(key: bytes, size: int) -> Words:
    """Return ``size`` words that only who has ``key`` can tell from random ones; a key makes one mask, so the counter begins at 0."""
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(WORD * size))
    return np.frombuffer(stream, "<u4")


def add_masks(words: Words, plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
    """Add the masks of some keys to words, and subtract those of others, in place, modulo 2^32."""
    for key in plus:
        words += mask(key, len(words))
    for key in minus:
        words -= mask(key, len(words))


def adds(client: str, other: str) -> bool:
    """Tell whether ``client`` adds the mask that it has with ``other``, who then subtracts it."""
    return client < other
