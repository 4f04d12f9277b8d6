"""A seed from shares of which some may be wrong: what shows a seed to be the one that was advertised shows who gave a wrong share, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, islice

from fedsb.secure.shamir import join

MOST_TRIES = 6000  # for one seed: of a hundred holders any two who are wrong are found, in some seconds; of 25 any three


def joined(
    shares: Mapping[str, bytes], numbers: Mapping[str, int], threshold: int, fits: Callable[[bytes], bool]
) -> tuple[bytes, tuple[str, ...]] | None:
    """Return a seed, and those whose shares had to be left out for it to come: the fewest, so that all of them were wrong.

    Args:
        shares: by holder; those who come first are believed first.
        numbers: of the holders.
        threshold: how many shares give a seed.
        fits: tells whether a seed is the one that is looked for.

    Returns:
        None where no choice of so many shares that was tried gives it.
    """
    tried = set()
    for left_out in islice(_fewest_first([*shares], len(shares) - threshold), MOST_TRIES):
        chosen = tuple([holder for holder in shares if holder not in left_out][:threshold])
        if chosen in tried:
            continue
        tried.add(chosen)
        try:
            seed = join({numbers[holder]: shares[holder] for holder in chosen})
        except ValueError:
            continue
        if fits(seed):
            return seed, left_out
    return None


def _fewest_first(holders: list[str], most: int) -> Iterator[tuple[str, ...]]:
    for size in range(most + 1):
        yield from combinations(holders, size)
