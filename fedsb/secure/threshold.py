"""How many clients must give their shares before anything is unmasked."""

from __future__ import annotations

import math

LEAST = 2  # clients in a sum: the sum of one is its upload
MOST_DROPOUT = 0.5


def threshold_of(cohort: int, dropout: float) -> int:
    """Return how many of a round's clients must stay where a share ``dropout`` of them may go, rounded down.

    It is more than half of them, whatever the share: a server that told one half that a client stayed and the other that it went would
    have too few shares of either key, for each gives one kind, and of two lists of who stayed too few would confirm either (Bonawitz et al.
    2017, section 6.2). Both hold against a server with fewer clients on its side than twice that number less the cohort.
    """
    may_go = math.floor(dropout * cohort + 1e-9)
    return max(LEAST, cohort - may_go, cohort // 2 + 1)
