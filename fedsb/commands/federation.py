"""``fedsb federation``: both sides of a federation over TLS, from their keys to their ends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedsb.commands.flags import with_values
from fedsb.commands.outcome import DONE, FAILED
from fedsb.core.errors import UserError, unknown
from fedsb.runtime.connection import FlowerError

Flags = Mapping[str, str]


def federation(arguments: Sequence[str]) -> int:
    """Do one of :data:`WHAT`, print what comes of it, and return the exit status.

    Raises:
        UserError: no such thing to do, or it can't be done with what is there.
    """
    what, *rest = arguments or [""]
    if what not in WHAT:
        raise unknown("fedsb federation", what, WHAT)
    others, flags = with_values(f"federation {what}", rest)
    if len(others) != 1:
        raise UserError(f"fedsb federation {what} takes one path; see fedsb federation --help")
    try:
        for line in WHAT[what](Path(others[0]).expanduser().absolute(), flags):
            print(line, flush=True)
    except FlowerError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _init(folder: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.certificates import certify
    from fedsb.node.cautions import exposed

    made = certify(folder, [host for host in flags.get("--host", "").split(",") if host])
    yield from map(str, made)
    yield from (f"caution: {line}" for path in made if path.suffix == ".key" and (line := exposed(path)))
    yield "nodes and submitters need ca.crt; the two .key files stay here"
    yield f"fedsb federation server {folder}"


def _node_key(path: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.certificates import node_key

    public = node_key(path)
    yield str(path)
    yield str(public)
    yield f"send {public.name} to whoever runs the SuperLink, for nodes/CLIENT.pub there; {path.name} stays here"


def _server(folder: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.link import HERE, PORT, serve
    from fedsb.federation.reach import split

    _, port = split(f"{HERE}:{flags.get('--port', PORT)}")
    serve(folder, flags.get("--host", HERE), port, _say)
    return ()


def _node(folder: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.member import Resident, join

    if "--link" not in flags:
        raise UserError("fedsb federation node needs the SuperLink's address: --link federation.example.org:443")
    if "--worker-user" in flags and "--worker" not in flags:
        raise UserError("--worker-user is the user of a worker that runs already: name its folder by --worker")
    place = flags.get("--worker")
    resident = None if place is None else Resident(Path(place).expanduser().absolute(), flags.get("--worker-user"))
    join(folder, flags["--link"], resident, _say)
    return ()


def _status(folder: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.status import status_of

    return status_of(folder)


def _stop(folder: Path, flags: Flags) -> Iterable[str]:
    from fedsb.federation.held import stop

    yield f"process {stop(folder)} of '{folder}' has ended"


def _say(line: str) -> None:
    print(line, flush=True)


WHAT: Mapping[str, Callable[[Path, Flags], Iterable[str]]] = {
    "init": _init,
    "node-key": _node_key,
    "server": _server,
    "node": _node,
    "status": _status,
    "stop": _stop,
}
