"""The ClientApp's part where a worker answers: bytes to its socket and back. Whatever goes wrong is told to the server by a code."""

from __future__ import annotations

import logging
import socket
import time
from contextlib import suppress
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

import fedsb
from fedsb.core.folders import home
from fedsb.core.logs import node_log, printable
from fedsb.privacy.codes import CODES
from fedsb.resident.flower import unlike
from fedsb.resident.frames import TAKEN, BadFrame, Frame, receive, send
from fedsb.resident.place import OWNER, WORKER, PlaceError, socket_path, token_at
from fedsb.resident.records import framed, unframed

LOG = logging.getLogger(__name__)
COMING_S = 90.0  # for a worker that its supervisor starts again
MOST_BYTES = 2**40  # of a reply, whose sender this side trusts


def mismatched(message: Message) -> Message | None:
    """Return the reply of a node whose Flower is not the server's, by a code, and log both versions; None where they go together."""
    if not (why := unlike(message)):
        return None
    with node_log(home() / "node.log"):
        return _code(message, "flower", printable(why))


def relayed(message: Message, context: Context) -> Message:
    """Return the worker's reply to a message, or a code that says why there is none."""
    with node_log(home() / "node.log"):
        try:
            reply = _asked(message, context)
            if "refused" in reply.head:
                return _code(message, "version" if reply.head["refused"] == "version" else "worker", str(reply.head.get("why", "")))
            return Message(unframed(reply), reply_to=message)
        except PlaceError as error:
            return _code(message, "node_config", f"{error}", error.key)
        except BadFrame as error:
            return _code(message, "worker", f"the worker's reply can't be read: {error}")
        except OSError as error:
            return _code(message, "worker", f"the worker at '{context.node_config[WORKER]}' did not answer: {error}")


def _asked(message: Message, context: Context) -> Frame:
    strange = sorted(context.node_config.keys() - {WORKER, OWNER})
    if strange:
        raise PlaceError(f"--node-config has {', '.join(strange)} beside {WORKER}; the worker's node.yaml says what they say")
    folder, owner = Path(str(context.node_config[WORKER])), context.node_config.get(OWNER)
    head = {
        "version": fedsb.__version__,
        "kind": message.metadata.message_type,
        "run": context.run_id,
        "overrides": str(context.run_config.get("overrides", "")),
    }
    deadline = time.monotonic() + COMING_S
    while True:
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                token = token_at(folder, None if owner is None else str(owner))
                peer.connect(str(socket_path(folder)))
                first = _taken(peer, framed(message.content, **head, token=token))
                # It may train for hours, or others before it; where it dies the connection ends.
                return receive(peer, MOST_BYTES) if TAKEN in first.head else first
        except (_Missing, FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


class _Missing(OSError):
    """No worker has taken the message: it can be asked again."""


def _taken(peer: socket.socket, frame: Frame) -> Frame:
    """Send a message and return what the worker says first: that it has it, or why it does not take it."""
    with suppress(BrokenPipeError, ConnectionResetError):  # it may have said so before it had all
        send(peer, frame)
    try:
        first = receive(peer, MOST_BYTES)
    except ConnectionError as error:
        raise _Missing(str(error)) from None
    if first.head.get("refused") == "token":  # it was read before the worker had started again
        raise _Missing("the worker does not know its token")
    return first


def _code(message: Message, code: str, why: str, key: str | None = None) -> Message:
    LOG.warning("no reply to '%s': %s", message.metadata.message_type, why)
    content = RecordDict({"metrics": MetricRecord({"code": CODES[code].number})})
    if key is not None:
        content["config"] = ConfigRecord({"key": key})
    return Message(content, reply_to=message)
