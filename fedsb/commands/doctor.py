"""``fedsb doctor``: what of this machine would make a run fail, and how to mend it; one line a check."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedsb.commands import doctor_checks as checks
from fedsb.commands.doctor_checks import Machine, Verdict
from fedsb.commands.flags import with_values
from fedsb.commands.outcome import DONE, FAILED
from fedsb.core.disk import reason_of
from fedsb.core.errors import UserError

CHECKS: Mapping[str, Callable[[Machine], Verdict]] = {
    "versions": checks.versions,
    "packages": checks.packages,
    "GPU": checks.gpu,
    "memory": checks.memory,
    "shared memory": checks.shared_memory,
    "folders": checks.folders,
    "disk": checks.disk,
    "offline": checks.offline,
    "port": checks.port,
    "smoke run": checks.smoke,
}
WIDE = max(map(len, CHECKS))


def doctor(arguments: Sequence[str]) -> int:
    """Try everything, and print a line for each check.

    Raises:
        UserError: a port that is no number, or something that is no flag.
    """
    given, flags = with_values("doctor", arguments)
    if given:
        raise UserError(f"fedsb doctor takes no '{given[0]}'; see fedsb doctor --help")
    if not (port := flags.get("--port", str(checks.PORT))).isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--port {port} is no port: give a number from 1 to 65535")
    return examine(Machine(output=Path(flags.get("--output", "outputs")), port=int(port)))


def examine(machine: Machine, names: Sequence[str] = tuple(CHECKS)) -> int:
    """Print the verdict of each check, and return the exit status: 1 where something would fail."""
    failed = []
    for name in names:
        verdict = _verdict(CHECKS[name], machine)
        print(f"{'ok  ' if verdict.well else 'FAIL'}  {name:<{WIDE}}  {verdict.said}", flush=True)
        failed += [] if verdict.well else [name]
    told = f"{len(failed)} of {len(names)} checks failed: {', '.join(failed)}" if failed else "all is well"
    print(told, file=sys.stderr if failed else sys.stdout)
    return FAILED if failed else DONE


def _verdict(check: Callable[[Machine], Verdict], machine: Machine) -> Verdict:
    """Return what a check finds; one that itself falls over has found something too."""
    try:
        return check(machine)
    except Exception as error:  # what is wrong with a machine has no class of errors
        said = (reason_of(error) or str(error) or type(error).__name__).splitlines()[0][:200]
        return Verdict(False, said if isinstance(error, UserError) else f"{type(error).__name__}: {said}; mend that first")
