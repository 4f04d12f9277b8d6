"""``fedsb worker``: the process that holds a node's model, data and ledger, and answers for it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from fedsb.commands.flags import SUPERVISE, with_values
from fedsb.core.errors import UserError

PLACE = "worker"  # beside node.yaml, where --at names no folder
# What is imported when it is needed elsewhere: a message that is ended in the midst of an import leaves a module that nobody can import.
LATER = ("datasets", "clients.private_round", "clients.private_start", "clients.stacked")


def worker(arguments: Sequence[str]) -> int:
    """Answer for a node until a signal ends the process.

    Raises:
        UserError: no file, a file that can't be used, or a folder that can't be had.
    """
    others, flags = with_values("worker", arguments)
    if others or "--node" not in flags:
        raise UserError("fedsb worker takes a node's file: fedsb worker --node /etc/fedsb/node.yaml; see fedsb worker --help")
    file = Path(flags["--node"]).expanduser().absolute()
    place = Path(flags["--at"]).expanduser().absolute() if "--at" in flags else file.parent / PLACE
    if SUPERVISE in flags:
        from fedsb.resident.watch import command_of, supervise

        return supervise(command_of(*(argument for argument in arguments if argument != SUPERVISE)), _say)
    _serve(file, place, flags.get("--group"))
    return 0


def _serve(file: Path, place: Path, group: str | None) -> None:
    # A file that can't be used is told before anything takes seconds.
    from fedsb.core.disk import private_files
    from fedsb.node.cautions import cautions
    from fedsb.node.file import read_file
    from fedsb.resident.place import opened
    from fedsb.resident.watch import die_with_supervisor

    die_with_supervisor()
    node = read_file(file)
    # Logs, own factors and ledgers are nobody else's; what the group may have is said where it is made.
    with private_files(), opened(place, group) as (door, token):
        from fedsb.core.collector import uncollected

        with uncollected(for_good=True):
            from fedsb.resident.service import Worker
            from fedsb.resident.watch import Pulse

            for name in LATER:
                importlib.import_module(name)
        for line in cautions(node):
            _say(f"caution: {line}")
        _say(f"fedsb worker of '{node.client}' at {place}")
        Worker(file, token, Pulse()).serve(door)


def _say(line: str) -> None:
    print(line, flush=True)
