"""A node's side: a worker that holds its data, and a SuperNode that takes the federation's messages to it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fedsb.core.errors import UserError
from fedsb.federation.executor import Executor
from fedsb.federation.held import held
from fedsb.federation.reach import check_reach
from fedsb.resident.place import OWNER, WORKER
from fedsb.resident.watch import command_of
from fedsb.runtime.connection import FlowerError, flower_environment, script
from fedsb.runtime.flower import free_port, tail
from fedsb.runtime.processes import ProcessTree, following

KEY, AUTHORITY, FILE = "key", "ca.crt", "node.yaml"
SUPERNODE = "supernode"
LOOK_S = 0.5
READY, READY_S = "fedsb worker of", 120.0  # for a worker to import what it needs on a busy machine
UNKNOWN = "[code: 2004]"  # in what a SuperNode writes that is not let in
REFUSED = (
    "the SuperLink does not let it in: it does not know {key} (which its operator puts into nodes/ there), has revoked it, "
    "or takes the process before, if that was killed, for alive"
)
KNOCK_S, PAUSE_S = 100.0, 5.0  # Flower takes a node that says nothing for alive for a minute
# One that is put out later, by a 401 in HTTP, ends as if it had been asked to.
PUT_OUT = "the SuperLink refuses its key: it was revoked, or one of the two clocks is off"
LINES = 20  # of a log that are shown


@dataclass(frozen=True)
class Resident:
    """A worker that somebody else runs: its folder, and the user as whom it runs."""

    place: Path
    user: str | None = None


@dataclass(frozen=True)
class Side:
    """A process of a node's, and what it has written since it began."""

    name: str
    folder: Path
    tree: ProcessTree
    earlier: int

    @property
    def log(self) -> Path:
        """Where it writes, behind what others of its name wrote before."""
        return self.folder / f"{self.name}.log"

    @property
    def status(self) -> int | None:
        """How it ended; None while it runs."""
        return self.tree.root.poll()

    def said(self) -> str:
        """Return what it has written."""
        return self.log.read_bytes()[self.earlier :].decode(errors="replace")

    def why(self) -> str:
        """Say why it has ended: what it means where that is known, else its last lines."""
        said = self.said()
        if self.name == SUPERNODE and UNKNOWN in said:
            return f"the SuperNode ended: {REFUSED.format(key=self.folder / f'{KEY}.pub')}"
        if self.name == SUPERNODE and self.status == 0:
            return f"the SuperNode ended: {PUT_OUT}"
        lines = said.splitlines()
        if self.name != SUPERNODE and (line := next((line for line in reversed(lines) if line.startswith("error: ")), "")):
            return f"the worker did not begin: {line.removeprefix('error: ')}"
        return f"the {self.name} ended with status {self.status}; the end of {self.log}:\n" + "\n".join(lines[-LINES:])


def join(folder: Path, address: str, resident: Resident | None, say: Callable[[str], None]) -> None:
    """Take part in a federation until a signal comes.

    Args:
        folder: with the node's key, the authority's certificate, and ``node.yaml`` unless a worker is there already.
        address: of the SuperLink, ``HOST:PORT``.
        resident: the worker; None: one is started beside the SuperNode, as the same user.
        say: takes lines for whoever started it.

    Raises:
        UserError: a file is missing, or the certificate is not the SuperLink's.
        FlowerError: the SuperLink does not answer, or refuses the node.
    """
    _check(folder, resident)
    check_reach(address, folder / AUTHORITY)
    with held(folder), ExitStack() as stack:
        sides = {} if resident else {"worker": _worker(stack, folder, say)}
        command = _command(folder, address, resident or Resident(folder / WORKER))
        say(f"node in '{folder}' takes part at {address}; logs: {', '.join(f'{name}.log' for name in (*sides, SUPERNODE))}")
        _take_part(lambda: _started(stack, folder, SUPERNODE, command), sides, say)


def _take_part(knock: Callable[[], Side], sides: dict[str, Side], say: Callable[[str], None]) -> NoReturn:
    """Run a SuperNode beside what runs already until one of them ends; one that is not let in is started again for a while."""
    deadline, said = time.monotonic() + KNOCK_S, ""
    while True:
        supernode = knock()
        every, executor = {**sides, SUPERNODE: supernode}, Executor(supernode.tree)
        while not (ended := [side for side in every.values() if side.status is not None]):
            if executor.gone() and supernode.status is None:
                raise FlowerError(f"no process answers messages any more; the end of {supernode.log}:\n{tail(supernode.log)}")
            time.sleep(LOOK_S)
        why = ended[0].why()
        if ended[0] is not supernode or UNKNOWN not in supernode.said() or time.monotonic() > deadline:
            raise FlowerError(why)
        if why != said:
            say(f"{why}; trying on for {KNOCK_S:.0f} s")
            said = why
        supernode.tree.end()
        time.sleep(PAUSE_S)


def _check(folder: Path, resident: Resident | None) -> None:
    makes = {
        KEY: f"'fedsb federation node-key {folder / KEY}' makes it",
        AUTHORITY: "take it from whoever runs the SuperLink",
        FILE: "docs/node.yaml has every key of it; or name a worker that runs already by --worker",
    }
    for name, remedy in makes.items():
        if not (folder / name).is_file() and not (name == FILE and resident is not None):
            raise UserError(f"'{folder / name}' is not there; {remedy}")


def _started(stack: ExitStack, folder: Path, name: str, command: list[str]) -> Side:
    home, log = folder / "flower", folder / f"{name}.log"
    home.mkdir(exist_ok=True)
    environment = flower_environment(home) | {"FEDSB_HOME": str(folder / "home")}
    earlier = log.stat().st_size if log.exists() else 0
    tree = ProcessTree(following(command), environment=environment, folder=folder, log=log)
    stack.callback(tree.end)
    return Side(name, folder, tree, earlier)


def _worker(stack: ExitStack, folder: Path, say: Callable[[str], None]) -> Side:
    """Start a worker and wait until it answers."""
    worker = _started(stack, folder, "worker", command_of("--node", str(folder / FILE), "--at", str(folder / WORKER), "--supervise"))
    deadline = time.monotonic() + READY_S
    while READY not in worker.said():
        if worker.status is not None:
            raise FlowerError(worker.why())
        if time.monotonic() > deadline:
            raise FlowerError(f"the worker has not begun in {READY_S:.0f} s; see {worker.log}")
        time.sleep(LOOK_S)
    say("its worker runs as this user: what the server sends can read what the worker reads (--worker names one of another user)")
    return worker


def _command(folder: Path, address: str, resident: Resident) -> list[str]:
    said = {WORKER: str(resident.place)} | ({} if resident.user is None else {OWNER: resident.user})
    pairs = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in said.items())
    own = ["--auth-supernode-private-key", str(folder / KEY), "--root-certificates", str(folder / AUTHORITY)]
    return [script("flower-supernode"), "--superlink", address, *own, "--port", str(free_port()), "--node-config", pairs]
