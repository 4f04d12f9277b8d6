"""A budget of epsilon."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """The largest epsilon of a whole ledger, or of one run's releases in it, the δ at which it is judged, and the key that set it."""

    epsilon: float
    delta: float
    key: str
    of_run: bool = False
