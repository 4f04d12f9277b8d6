"""The folder in which a worker can be found: its socket, and the token that whoever may talk to it can read.

Who owns the folder owns the worker. A relay holds owner and permissions before it sends anything: a socket that somebody else has put there
would be handed the server's messages, and could answer in the client's name.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsb.core.errors import UserError

WORKER, OWNER = "worker", "worker-user"  # keys of --node-config: the folder, and the user whom it belongs to
SOCKET, TOKEN, LOCK = "worker.sock", "token", "lock"
LONGEST = 107  # bytes of the path of a Unix socket


class PlaceError(UserError):
    """A worker's folder is not what it must be, or is not there."""

    def __init__(self, message: str) -> None:
        super().__init__(message, key=WORKER)


def socket_path(folder: Path) -> Path:
    """Return where the socket of a folder is.

    Raises:
        PlaceError: the path is longer than the system bears.
    """
    path = folder / SOCKET
    if len(os.fsencode(path)) > LONGEST:
        raise PlaceError(f"'{path}' is longer than the {LONGEST} bytes of a socket's path; choose a folder nearer to the root")
    return path


@contextmanager
def opened(folder: Path, group: str | None = None) -> Iterator[tuple[socket.socket, str]]:
    """Open the door of a worker: yield the listening socket and the token, and take both away behind the block.

    Args:
        folder: made where it is not there.
        group: of the system, whose members may talk to the worker; None: its own user alone.

    Raises:
        PlaceError: another worker is there, the folder is somebody else's, or the group is none of this user's.
    """
    path = socket_path(folder)
    _own(folder, 0o700 if group is None else 0o750, group)
    with os.fdopen(os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)) as lock, socket.socket(socket.AF_UNIX) as door:
        os.fchmod(lock.fileno(), 0o600)  # whoever can open it can hold it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlaceError(f"a worker is at '{folder}' already; end it, or choose another folder with --at") from None
        for stale in (folder / TOKEN, path):  # without a token nobody knocks
            stale.unlink(missing_ok=True)
        door.bind(str(path))
        _own(path, 0o600 if group is None else 0o660, group)
        token = _new_token(folder, group)
        door.listen(64)
        try:
            yield door, token
        finally:
            for name in (SOCKET, TOKEN):
                (folder / name).unlink(missing_ok=True)


def _own(path: Path, mode: int, group: str | None) -> None:
    try:
        if not path.exists():
            path.mkdir(parents=True)
        if group is not None:
            shutil.chown(path, group=group)
        path.chmod(mode)
    except LookupError:
        raise PlaceError(f"--group {group}: this machine has no such group") from None
    except OSError as error:
        raise PlaceError(f"'{path}' can't be made this user's own ({(error.strerror or '').lower()}); choose another folder") from None


def _new_token(folder: Path, group: str | None) -> str:
    token, draft = secrets.token_hex(32), folder / f".{TOKEN}"
    with suppress(FileNotFoundError):
        draft.unlink()
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)
    _own(draft, 0o600 if group is None else 0o640, group)
    draft.replace(folder / TOKEN)
    return token


def token_at(folder: Path, owner: str | None = None) -> str:
    """Return the token of a worker's folder, once owner and permissions are held.

    Args:
        folder: as ``--node-config`` names it.
        owner: the user whom it must belong to; None: this process's own, or root.

    Raises:
        PlaceError: it is not there, is not that user's, or others may write to it.
    """
    if not folder.is_absolute():
        raise PlaceError(f'{WORKER}="{folder}" in --node-config must begin at the root, as /run/fedsb/ward-7 does')
    owners = {os.getuid(), 0} if owner is None else {_uid(owner)}
    try:
        for path in (folder, socket_path(folder), folder / TOKEN):
            found = path.lstat()
            if found.st_uid not in owners:
                raise PlaceError(f"'{path}' belongs to user {_name(found.st_uid)}; name the worker's with {OWNER}=… in --node-config")
            if stat.S_IMODE(found.st_mode) & (0o022 if path != socket_path(folder) else 0o002):
                raise PlaceError(f"others than its owner may write to '{path}'; end the worker there and start it again")
        return (folder / TOKEN).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"no worker is at '{folder}'") from None
    except OSError as error:
        raise PlaceError(f"'{folder}' can't be read ({(error.strerror or '').lower()}); let the SuperNode's user into its group") from None


def _uid(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise PlaceError(f"{OWNER}={name}: this machine has no such user") from None


def _name(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)
