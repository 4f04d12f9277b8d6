"""Any ``threshold`` shares give the secret; fewer give nothing, for every secret goes with them."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.secure.shamir import PRIME, SECRET, SHARE, join, split


def slowly(shares: dict[int, bytes]) -> int:
    """Return the value at 0 of the polynomial through the shares, by Lagrange's formula in fractions, reduced at the end."""
    total = Fraction(0)
    for x, share in shares.items():
        term = Fraction(int.from_bytes(share, "big"))
        for other in shares:
            if other != x:
                term *= Fraction(-other, x - other)
        total += term
    return total.numerator * pow(total.denominator, -1, PRIME) % PRIME


@given(st.binary(min_size=SECRET, max_size=SECRET), st.integers(1, 6), st.integers(0, 3), st.randoms())
def test_any_threshold_shares_give_the_secret(secret: bytes, threshold: int, more: int, draw: st.Random) -> None:
    parts = dict(enumerate(split(secret, threshold, threshold + more), 1))
    some = dict(draw.sample(sorted(parts.items()), threshold))
    assert all(len(part) == SHARE for part in parts.values())
    assert join(some) == secret == slowly(some).to_bytes(SECRET, "big")
    assert join(parts) == secret


def test_fewer_shares_go_with_every_secret() -> None:
    """One share short, there is for any secret a polynomial with just these shares: the missing one can be chosen so."""
    secret, other = bytes(range(SECRET)), bytes(SECRET)
    parts = dict(enumerate(split(secret, 3, 5), 1))
    for pair in combinations(parts, 2):
        known = {number: parts[number] for number in pair}
        missing = next(number for number in parts if number not in pair)
        # f(0) = Σ w_i f(i): solve for f(missing) where f(0) is the other secret.
        at_one = slowly({**known, missing: (1).to_bytes(SHARE, "big")})
        at_zero = slowly({**known, missing: bytes(SHARE)})
        wanted = (int.from_bytes(other, "big") - at_zero) * pow(at_one - at_zero, -1, PRIME) % PRIME
        assert join({**known, missing: wanted.to_bytes(SHARE, "big")}) == other


def test_too_few_shares_are_noticed_nearly_always() -> None:
    parts = dict(enumerate(split(bytes(SECRET), 4, 5), 1))
    with pytest.raises(ValueError, match="not of one secret"):
        join({number: parts[number] for number in (1, 2, 3)})
    assert sum(split(bytes(SECRET), 2, 3) == parts for _ in range(3)) == 0
