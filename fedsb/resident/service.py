"""What a worker does: it answers one message after another, in one process that keeps model, tokens, frozen parts and accounts.

It runs the operator's own copy of fedsb, as a user as whom nothing runs that a server ships. What a relay hands it are bytes, and nothing
of them is believed: configuration and labels are a request, ``node.yaml`` decides, and the ledger is this user's.
"""

from __future__ import annotations

import hmac
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedsb
from fedsb.app.answering import forget
from fedsb.app.answers import app
from fedsb.core.folders import home
from fedsb.core.logs import node_log, printable
from fedsb.node.file import read_file
from fedsb.node.reading import FILE
from fedsb.node.values import NodeConfigError
from fedsb.resident.frames import SILENCE_S, TAKEN, BadFrame, Frame, receive, send
from fedsb.resident.records import framed, unframed
from fedsb.resident.watch import Pulse
from fedsb.runtime.grid import claim_identity

LOG = logging.getLogger(__name__)
KINDS = (
    *("query.notice", "query.describe", "train", "train.evidence", "train.projection", "evaluate"),
    *("train.keys", "train.shares", "train.survivors", "train.unmask"),
)
GIB = 2**30
MOST_PLACES = 4096  # of data that are looked at before each message; of more of them what was read is never trusted
NODE = 2  # of messages that are built here, where nothing depends on it
RESIDENT = "resident"  # what a worker's description of its node has beside


class Refused(Exception):
    """What came is not answered, and no run's business.

    Args:
        what: key of the reply's head.
        why: the line.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(why)
        self.what = what


class Worker:
    """Answers for the node of one operator.

    Args:
        file: its ``node.yaml``, absolute.
        token: that a relay must show.
        pulse: tells the supervisor when a message is begun and over.
    """

    def __init__(self, file: Path, token: str, pulse: Pulse) -> None:
        self._file = file
        self._token = token
        self._pulse = pulse
        self._stamp: object = None
        claim_identity()

    def serve(self, door: socket.socket, *, until: Callable[[], bool] = lambda: False) -> None:
        """Answer what comes through the door, one peer after the other."""
        self._pulse.begun()
        while not until():
            try:
                peer, _ = door.accept()
                with peer:
                    peer.settimeout(SILENCE_S)
                    self._attend(peer)
            except OSError as error:  # this peer is gone; the next may come
                self._note(f"a peer was left: {error}")
            except Exception:  # a fault of ours must not end what others wait for
                with node_log(home() / "node.log"):
                    LOG.exception("a peer was left")

    def _attend(self, peer: socket.socket) -> None:
        try:
            message, context = self._call(self._received(peer))
        except Refused as error:
            self._note(f"refused: {error}")
            send(peer, Frame({"refused": error.what, "why": str(error)}))
            return
        send(peer, Frame({TAKEN: True}))
        send(peer, framed(self._answered(message, context)))

    def _received(self, peer: socket.socket) -> Frame:
        try:
            frame = receive(peer, self._most())
        except BadFrame as error:
            raise Refused("frame", str(error)) from None
        token = frame.head.get("token")
        if not isinstance(token, str) or not token.isascii() or not hmac.compare_digest(token, self._token):
            raise Refused("token", "a peer without this worker's token")
        if frame.head.get("version") != fedsb.__version__:
            raise Refused("version", f"the app is of fedsb {frame.head.get('version')!s:.20}, and this worker of {fedsb.__version__}")
        return frame

    def _most(self) -> int:
        try:
            return int(read_file(self._file).limits.max_message_gb * GIB)
        except NodeConfigError:  # which the answer says
            return GIB

    def _answered(self, message: Message, context: Context) -> RecordDict:
        with self._pulse.over(self._seconds()):  # a disk that does not come back is a supervisor's business too
            self._refresh()
            reply = app(message, context)
        if message.metadata.message_type == "query.describe" and not reply.has_error():
            said = reply.content.config_records.get("config") or ConfigRecord()
            reply.content["config"] = ConfigRecord({**said, RESIDENT: fedsb.__version__})
        return reply.content

    def _call(self, frame: Frame) -> tuple[Message, Context]:
        """Return what the ClientApp is called with: nothing of the relay's but content, kind, run and overrides."""
        head, kind, run = frame.head, frame.head.get("kind"), frame.head.get("run")
        if kind not in KINDS or type(run) is not int or not isinstance(head.get("overrides"), str):
            raise Refused("frame", "its head names no message that there is")
        try:
            message = Message(unframed(frame), NODE, kind)
        except BadFrame as error:
            raise Refused("frame", str(error)) from None
        message.metadata.__dict__["_message_id"] = "relayed"  # a reply wants one to answer to
        run_config: dict[str, Any] = {"overrides": head["overrides"]}
        return message, Context(run, NODE, {FILE: str(self._file)}, RecordDict(), run_config)

    def _seconds(self) -> float | None:
        try:
            return read_file(self._file).limits.max_seconds
        except NodeConfigError:
            return None

    def _refresh(self) -> None:
        """Forget what was made of a ``node.yaml`` or of data that have changed since."""
        stamp = _stamp(self._file)
        if self._stamp not in (None, stamp):
            LOG.warning("node.yaml or the data have changed: what was made of them is made again")
            forget()
        self._stamp = stamp

    def _note(self, line: str) -> None:
        with node_log(home() / "node.log"):
            LOG.warning("%s", printable(line))


def _stamp(file: Path) -> object:
    """Return what changes where ``node.yaml`` or data do; of more than :data:`MOST_PLACES` files something that always does."""
    try:
        node = read_file(file)
    except NodeConfigError:
        return None
    own = [path for path in (node.data_path, node.data.test_path) if path is not None]
    places = [*islice(_places(str(file), *own), MOST_PLACES + 1)]
    return object() if len(places) > MOST_PLACES else sorted(places)


def _places(*paths: str) -> Iterator[tuple[str, int, int]]:
    """Yield files and folders, and all that is below these, with their times and sizes."""
    waiting = [*paths]
    while waiting:
        place = waiting.pop()
        with suppress(OSError):
            found = os.stat(place)
            yield place, found.st_mtime_ns, found.st_size
            if stat.S_ISDIR(found.st_mode):
                waiting += [entry.path for entry in os.scandir(place) if not entry.is_dir() or not entry.is_symlink()]
