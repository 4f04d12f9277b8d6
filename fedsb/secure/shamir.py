"""Shamir's secret sharing over a prime field: of so many shares any ``threshold`` give the secret, and fewer tell nothing.

Shamir 1979, "How to share a secret". Flower's own shares lie in GF(2^128) and take three pieces and a thread pool for a key, each some
hundred times slower than the whole here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

PRIME = 2**255 - 19
SECRET = 31  # bytes: every secret is below the prime
SHARE = 32  # bytes


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Return the shares of ``holders`` parties, whose numbers are 1, 2, … in order.

    Args:
        secret: :data:`SECRET` bytes.
        threshold: how many shares give it back.
        holders: how many there are.
    """
    assert len(secret) == SECRET
    assert 1 <= threshold <= holders
    polynomial = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), int.from_bytes(secret, "big")]
    return [_at(polynomial, number).to_bytes(SHARE, "big") for number in range(1, holders + 1)]


def _at(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret from shares by the numbers of their holders; what fewer than ``threshold`` give is no secret.

    Raises:
        ValueError: they are not of one secret.
    """
    weights = _weights(tuple(shares))
    value = sum(weight * int.from_bytes(share, "big") for weight, share in zip(weights, shares.values(), strict=True)) % PRIME
    if value.bit_length() > 8 * SECRET:
        raise ValueError("the shares are not of one secret")
    return value.to_bytes(SECRET, "big")


@lru_cache(maxsize=8)
def _weights(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights of a polynomial's values at ``numbers`` for that at 0."""
    found = []
    for own in numbers:
        above = below = 1
        for other in numbers:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
