"""Commands read by what would read them, and not run: a key, value, flag, script or target that is not there is an error."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedsb.app.prepare import check_method
from fedsb.commands.federation import WHAT
from fedsb.commands.flags import SWEEP, flags_in, has_flag, overrides_in, with_values
from fedsb.commands.submit import read_arguments
from fedsb.config.compose import load
from fedsb.config.overrides import readable
from fedsb.core.errors import UserError, unknown
from fedsb.sweep.grid import resolved
from strategies import STRATEGIES
from tests.docs.blocks import ROOT
from tests.docs.shell import SAID

Words = Sequence[str]
OF_THE_RUN = ("resume=", "output=")  # folders of the reader


def check(command: Words) -> None:
    """Hold a command against what would take it; what the reader is to put in (``…``) is passed over.

    Raises:
        UserError: it would be refused.
    """
    name, *rest = (word for word in command if SAID not in word)
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    COMMANDS[name](rest)


def check_fedsb(arguments: Words) -> None:
    """Hold the arguments of ``fedsb`` against what it takes.

    Raises:
        UserError: it would refuse them.
    """
    command, *rest = arguments
    if command not in FEDSB:
        raise unknown("command", command, FEDSB)
    FEDSB[command](rest)


def _run(arguments: Words) -> None:
    flags = flags_in(arguments)
    given = [readable(text) for text in overrides_in(arguments) if not text.startswith(OF_THE_RUN)]
    if not has_flag(flags, SWEEP):
        check_method(load(given))
        return
    own = [text for text in given if text.startswith(("sweep.", "sweep="))]
    seen: set[str] = set()
    for job in resolved([text for text in given if text not in own], load(own).sweep):
        if not seen.issuperset(job.overrides):  # each value once, not each combination
            check_method(load(job.overrides))
        seen |= set(job.overrides)


def _submit(arguments: Words) -> None:
    check_method(load([text for text in read_arguments(arguments)[1] if not text.startswith(OF_THE_RUN)]))


def _cost(arguments: Words) -> None:
    overrides = with_values("cost", arguments)[0]
    for name in load([f"+{text}" if text.startswith("cost.rank.") else text for text in overrides]).cost.rank:
        if name not in STRATEGIES:
            raise unknown("method", name, STRATEGIES)


def _node(arguments: Words) -> None:
    what, file, *overrides = arguments
    if what != "check" or "=" in file:
        raise UserError(f"fedsb node {what} {file}")
    load(overrides)


def _federation(arguments: Words) -> None:
    what, *rest = arguments
    if what not in WHAT:
        raise unknown("fedsb federation", what, WHAT)
    others, flags = with_values(f"federation {what}", rest)
    if len(others) != 1 or (what == "node" and "--link" not in flags):
        raise UserError(f"fedsb federation {' '.join(arguments)}: one path, and of a node --link")


def _worker(arguments: Words) -> None:
    others, flags = with_values("worker", arguments)
    if others or "--node" not in flags:
        raise UserError(f"fedsb worker {' '.join(arguments)}")


def _of_folders(command: str, least: int, most: int) -> Callable[[Words], None]:
    def held(arguments: Words) -> None:
        others, _ = with_values(command, arguments)
        if not least <= len(others) <= most or any("=" in other for other in others):
            raise UserError(f"fedsb {command} takes {least} to {most} folders, and got {others}")

    return held


FEDSB: Mapping[str, Callable[[Words], None]] = {
    "run": _run,
    "submit": _submit,
    "cost": _cost,
    "report": _of_folders("report", 1, 99),
    "watch": _of_folders("watch", 1, 1),
    "eval": _of_folders("eval", 1, 1),
    "export": _of_folders("export", 1, 2),
    "node": _node,
    "worker": _worker,
    "federation": _federation,
    "doctor": _of_folders("doctor", 0, 0),
    "completion": _of_folders("completion", 1, 1),
}


def _python(arguments: Words) -> None:
    if arguments[0] in ("-m", "-c"):
        return
    script = ROOT / "scripts" / arguments[0].partition("scripts/")[2]
    _script(script, arguments[1:])


def _script(script: Path, arguments: Words) -> None:
    if not script.is_file():
        raise UserError(f"{script.relative_to(ROOT)} is not there")
    source = script.read_text(encoding="utf-8")
    for flag in (word for word in arguments if word.startswith("--")):
        if flag[2:] not in source:
            raise UserError(f"{script.relative_to(ROOT)} has no {flag}")
    if overrides := [word for word in arguments if re.fullmatch(r"[a-z_.]+=.*", word)]:
        load(overrides)


def _make(arguments: Words) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in (word for word in arguments if "=" not in word):
        if target not in targets:
            raise unknown("target", target, targets)


def _pip(arguments: Words) -> None:
    """``tests/test_requirements.py`` holds versions; here files and extras."""
    for word in arguments:
        if word.endswith(".txt") and not (ROOT / word).is_file():
            raise UserError(f"{word} is not there")
        for extra in re.findall(r"\[([\w,]+)\]$", word):
            if missing := [name for name in extra.split(",") if not re.search(rf"^{name} = ", PROJECT, re.MULTILINE)]:
                raise UserError(f"no extra {', '.join(missing)}")


PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _installed(name: str) -> Callable[[Words], None]:
    """Hold that a program of another package is there, beside the interpreter too: its flags are its own."""

    def held(arguments: Words) -> None:
        if not shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])):
            raise UserError(f"no {name} here")

    return held


COMMANDS: Mapping[str, Callable[[Words], None]] = {
    "fedsb": check_fedsb,
    "python": _python,
    "make": _make,
    "pip": _pip,
    "scripts/bench/gpu_setup.sh": lambda arguments: _script(ROOT / "scripts/bench/gpu_setup.sh", arguments),
    **{name: _installed(name) for name in ("flwr", "flower-superlink", "flower-supernode")},
    **dict.fromkeys(("cd", "cp", "mkdir", "echo", "git", "cat", "ls"), lambda arguments: None),
}
