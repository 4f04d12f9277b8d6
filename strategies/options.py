"""What a method's option may be, checked alike for all methods."""

from __future__ import annotations

from collections.abc import Callable

from fedsb.core.errors import UserError


def number(value: object, holds: Callable[[float], bool], said: str) -> float:
    """Return an option that has to be a number, as it comes from a file or a command line.

    Args:
        value: as it was given.
        holds: tells whether a number will do; NaN does not where it compares.
        said: what the option must be, with its key and what was given.

    Raises:
        UserError: it is no number, or one that will not do; ``true`` is none.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and holds(value):
        return float(value)
    raise UserError(said)
