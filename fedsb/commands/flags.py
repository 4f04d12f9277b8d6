"""Flags among the arguments of a command: Hydra's of ``fedsb run``; the others know none."""

from __future__ import annotations

from collections.abc import Sequence

from fedsb.core.errors import UserError, unknown

SWEEP = ("-m", "--multirun")
SHOWING = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
FLAGS = (*SWEEP, *SHOWING, *WITH_VALUE, "--resolve", "--run", "-r", "--experimental-rerun")


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """Return the overrides among Hydra's arguments: what is neither a flag nor the value of one."""
    return [a for a, is_flag in _marked(arguments) if not is_flag]


def flags_in(arguments: Sequence[str]) -> list[str]:
    """Return the flags among Hydra's arguments, each with its value.

    Raises:
        UserError: Hydra has no such flag.
    """
    flags = [a for a, is_flag in _marked(arguments) if is_flag]
    for flag in (a.partition("=")[0] for a in flags if a.startswith("-")):
        if flag not in FLAGS:
            raise unknown("flag", flag, (*SWEEP, "--cfg", "--help", "--hydra-help"))
    return flags


def has_flag(arguments: Sequence[str], names: Sequence[str]) -> bool:
    """Tell whether one of the flags is given."""
    return any(flag.partition("=")[0] in names for flag in arguments)


def without_flags(command: str, arguments: Sequence[str], most: int | None = None) -> list[str]:
    """Return the arguments of a command that knows no flags.

    Raises:
        UserError: one is a flag, or there are more than ``most``.
    """
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(f"fedsb {command} has no flag '{argument}'; see fedsb {command} --help")
    if most is not None and len(arguments) > most:
        raise UserError(f"fedsb {command} takes {most} arguments at most, and '{arguments[most]}' is one more; see fedsb {command} --help")
    return list(arguments)


def with_values(command: str, arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Sort arguments into what is no flag, and the flags with their values, which follow them or stand behind ``=``.

    Raises:
        UserError: a flag that nobody knows, or that has no value.
    """
    others: list[str] = []
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        flag, given, value = rest.pop(0).partition("=")
        if not flag.startswith("-"):
            others.append(flag + given + value)
            continue
        if flag not in names:
            raise unknown("flag", flag, names)
        if not given and not rest:
            raise UserError(f"{flag} needs a value; see fedsb {command} --help")
        flags[flag] = value if given else rest.pop(0)
    return others, flags


def _marked(arguments: Sequence[str]) -> list[tuple[str, bool]]:
    values = [i + 1 for i, argument in enumerate(arguments) if argument in WITH_VALUE]
    return [(a, a.startswith("-") or i in values) for i, a in enumerate(arguments)]
