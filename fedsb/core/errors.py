"""The one exception that a user's mistake raises, and how its message names the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: the message is one line that names the value, what is allowed and the remedy.

    Args:
        message: the line.
        key: the key of the configuration at fault, where the line does not begin with it.
    """

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class NothingToTrainError(UserError):
    """Neither adapters nor a head: the method does not go with the task."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest allowed spelling of ``value``, or an empty string."""
    # Capitals and spaces around are what a table's header differs in most.
    spellings = {name.strip().casefold(): name for name in sorted(allowed, reverse=True)}
    close = difflib.get_close_matches(value.strip().casefold(), spellings, n=1, cutoff=0.5)
    return f" (did you mean '{spellings[close[0]]}'?)" if close else ""


def unknown(kind: str, value: str, allowed: Iterable[str]) -> UserError:
    """Build the error for a name that is not in a table: ``unknown method 'fedx'; choose from …``."""
    names = sorted(allowed)
    return UserError(f"unknown {kind} '{value}'{nearest(value, names)}; choose from {', '.join(names)}")


def check_options(key: str, owner: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Hold the names of options below a key against those that their owner has.

    Raises:
        UserError: it has no such option: ``method.options.truncate: method 'fed_sb' has no such option; it has none``.
    """
    names = sorted(allowed)
    for name in given:
        if name not in names:
            choice = f"choose from {', '.join(names)}" if names else f"it has none; leave {key}.{name} out"
            raise UserError(f"{key}.{name}: {owner} has no such option{nearest(name, names)}; {choice}")


def is_fault(error: BaseException) -> bool:
    """Tell a fault from what ends a process: libraries in Rust panic with an exception that is no ``Exception``."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class RunError(RuntimeError):
    """A run that cannot go on: too few valid replies, or no client to talk to. The message is one line."""
