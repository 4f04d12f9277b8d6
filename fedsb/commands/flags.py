"""Flags: one table of what every command takes, and how arguments are sorted by it.

Help, shell completion and the commands go by the same table. It must stay quick to import: a shell waits for it at each tab.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fedsb.core.errors import UserError, unknown


class Flag(NamedTuple):
    """A flag, by its names; ``value`` says what has to follow (``[…]``: what may), and ``choices`` what it may be."""

    names: tuple[str, ...]
    value: str = ""
    choices: tuple[str, ...] = ()

    @property
    def needs_value(self) -> bool:
        """Whether it means nothing alone."""
        return bool(self.value) and not self.value.startswith("[")


class Given(NamedTuple):
    """An argument as it was written, or a flag with its value, in one piece or two."""

    texts: tuple[str, ...]
    flag: str = ""
    value: str | None = None


SWEEP = ("-m", "--multirun")
SHOWING = ("--cfg", "-c", "--info", "-i", "--hydra-help")
SUPERVISE = "--supervise"
FORMATS = ("merged", "peft", "gguf-ready")
DTYPES = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")

FLAGS: Mapping[str, tuple[Flag, ...]] = {
    # Of Hydra's own those that work here: a configuration from elsewhere would pass by the checks.
    "run": (
        Flag(SWEEP),
        Flag(("--cfg", "-c"), "WHAT", ("job", "hydra", "all")),
        Flag(("--package", "-p"), "KEY"),
        Flag(("--resolve",)),
        Flag(("--info", "-i"), "[WHAT]", ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
        Flag(("--hydra-help",)),
    ),
    "submit": (),
    "cost": (),
    "report": tuple(
        Flag((name,), value)
        for name, value in (("--against", "METHOD"), ("--metric", "NAME"), ("--target", "VALUE"), ("--tuned", "TEXT"), ("--out", "FOLDER"))
    ),
    "watch": (Flag(("--html",)), Flag(("--every",), "SECONDS"), Flag(("--once",))),
    "eval": (
        Flag(("--max-examples",), "N"),
        Flag(("--tasks",), "TASK,TASK", ("loss", "exact_match", "choice")),
        Flag(("--answers",), "FILE"),
        Flag(("--lm-eval",), "tasks=NAME,NAME"),
    ),
    "export": (Flag(("--format",), "FORMAT", FORMATS), Flag(("--dtype",), "DTYPE", DTYPES)),
    "node": (),
    "worker": (Flag(("--node",), "FILE"), Flag(("--at",), "FOLDER"), Flag(("--group",), "NAME"), Flag((SUPERVISE,))),
    "federation init": (Flag(("--host",), "NAME,ADDRESS,…"),),
    "federation node-key": (),
    "federation server": (Flag(("--host",), "ADDRESS"), Flag(("--port",), "PORT")),
    "federation node": (Flag(("--link",), "HOST:PORT"), Flag(("--worker",), "FOLDER"), Flag(("--worker-user",), "NAME")),
    "federation status": (),
    "federation stop": (),
    "doctor": (Flag(("--output",), "FOLDER"), Flag(("--port",), "PORT")),
    "completion": (),
}


def names_of(command: str) -> tuple[str, ...]:
    """Return all names of a command's flags."""
    return tuple(name for flag in FLAGS.get(command, ()) for name in flag.names)


def flag_of(command: str, name: str) -> Flag | None:
    """Return the flag of that name, if the command has one."""
    return next((flag for flag in FLAGS.get(command, ()) if name in flag.names), None)


def parsed(command: str, arguments: Sequence[str]) -> Iterator[Given]:
    """Yield what is given to a command, each flag with its value, which follows it or stands behind ``=``."""
    rest = list(arguments)
    while rest:
        text = rest.pop(0)
        name, equals, value = text.partition("=")
        if not text.startswith("-"):
            yield Given((text,))
        elif equals:
            yield Given((text,), name, value)
        elif (flag := flag_of(command, name)) and rest and (flag.needs_value or rest[0] in flag.choices):
            value = rest.pop(0)
            yield Given((text, value), name, value)
        else:
            yield Given((text,), name)


def with_values(command: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Sort arguments into what is no flag, and the flags with their values; that of a flag without one is empty.

    Raises:
        UserError: a flag that the command does not have, that lacks its value, or that takes none.
    """
    given = list(parsed(command, arguments))
    for each in given:
        if each.flag:
            _check(command, each)
    return [each.texts[0] for each in given if not each.flag], {each.flag: each.value or "" for each in given if each.flag}


def without_flags(command: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command that has no flags.

    Raises:
        UserError: one is a flag.
    """
    return with_values(command, arguments)[0]


def overrides_in(arguments: Sequence[str]) -> list[str]:
    """Return the overrides among the arguments of ``fedsb run``: what is neither a flag nor the value of one."""
    return [each.texts[0] for each in parsed("run", arguments) if not each.flag]


def flags_in(arguments: Sequence[str]) -> list[str]:
    """Return the flags among the arguments of ``fedsb run``, each with its value.

    Raises:
        UserError: there is no such flag, its value is missing, or is none that it may have.
    """
    flags = [each for each in parsed("run", arguments) if each.flag]
    for each in flags:
        choices = _check("run", each).choices
        if each.value is not None and choices and each.value not in choices:
            raise unknown(f"{each.flag} value", each.value, choices)
    return [text for each in flags for text in each.texts]


def has_flag(arguments: Sequence[str], names: Sequence[str]) -> bool:
    """Tell whether one of the flags is given."""
    return any(flag.partition("=")[0] in names for flag in arguments)


def _check(command: str, given: Given) -> Flag:
    flag, page = flag_of(command, given.flag), f"see fedsb {command.split()[0]} --help"
    if flag is None:
        if not FLAGS[command]:
            raise UserError(f"fedsb {command} has no flag '{given.flag}'; {page}")
        raise unknown("flag", given.flag, names_of(command))
    if flag.needs_value and given.value is None:
        raise UserError(f"{given.flag} needs a value; {page}")
    if not flag.value and given.value is not None:
        raise UserError(f"{given.flag} takes no value; {page}")
    return flag
