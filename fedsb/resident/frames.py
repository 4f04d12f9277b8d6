"""What goes over a worker's socket: a head of JSON and the bytes of arrays, each with its length said before and held against a bound.

Nothing is pickled, and nothing is taken at its word: memory is taken as bytes arrive, and a peer that stops in the middle is left.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAGIC = b"fedsb-worker-1\n"
MOST_HEAD = 2**24  # bytes of JSON: names and shapes of a bundle of a large model are some hundred thousand
PIECE = 2**20
SILENCE_S = 60.0  # between two pieces of one frame,
SLOWEST = 2**20  # and bytes a second beyond that
MOST_BLOBS = 2**16
TAKEN = "taken"  # what a worker says first: it has the message, and whatever becomes of it has begun


class BadFrame(ValueError):
    """What came is no frame, or a longer one than is taken."""


@dataclass(frozen=True)
class Frame:
    """One message over the socket.

    Attributes:
        head: what JSON can say.
        blobs: bytes, in the order in which the head counts on them.
    """

    head: dict[str, Any]
    blobs: tuple[bytes | bytearray | memoryview, ...] = ()


def send(peer: socket.socket, frame: Frame) -> None:
    """Send a frame."""
    head = json.dumps({"head": frame.head, "sizes": [len(blob) for blob in frame.blobs]}).encode()
    for blob in (MAGIC + struct.pack(">Q", len(head)) + head, *frame.blobs):
        view = memoryview(blob).cast("B") if len(blob) else memoryview(b"")
        for i in range(0, len(view), PIECE):  # a timeout is one of a call
            peer.sendall(view[i : i + PIECE])


def receive(peer: socket.socket, most: int) -> Frame:
    """Receive a frame.

    Args:
        peer: with the timeout that it is to have between two pieces.
        most: bytes that it may hold beside its head.

    Raises:
        BadFrame: it is none, or too long.
        ConnectionError: the other side is gone.
        TimeoutError: it is silent.
    """
    silence = peer.gettimeout()
    late = None if silence is None else time.monotonic() + 2 * silence
    if bytes(_exactly(peer, len(MAGIC), late)) != MAGIC:
        raise BadFrame("what came does not begin as a frame does; both sides must have one version of fedsb")
    (length,) = struct.unpack(">Q", _exactly(peer, 8, late))
    if length > MOST_HEAD:
        raise BadFrame(f"a head of {length:,} bytes, and {MOST_HEAD:,} are taken")
    try:
        said = json.loads(bytes(_exactly(peer, length, late)))
        head, sizes = said["head"], said["sizes"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadFrame("its head can't be read") from None
    if not isinstance(head, dict) or not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise BadFrame("its head says no lengths")
    if len(sizes) > MOST_BLOBS or any(size > most for size in sizes) or sum(sizes) > most:
        raise BadFrame(f"a message of {len(sizes)} arrays with more than the {most:,} bytes, or {MOST_BLOBS:,} arrays, that are taken")
    return Frame(head, _blobs(peer, sizes, None if late is None else late + sum(sizes) / SLOWEST))


def _blobs(peer: socket.socket, sizes: Sequence[int], late: float | None) -> tuple[bytearray, ...]:
    return tuple(_exactly(peer, size, late) for size in sizes)


def _exactly(peer: socket.socket, count: int, late: float | None) -> bytearray:
    found = bytearray()
    while len(found) < count:
        if late is not None and time.monotonic() > late:
            raise TimeoutError("the other side is too slow")
        piece = peer.recv(min(PIECE, count - len(found)))
        if not piece:
            raise ConnectionError("the other side is gone")
        found += piece
    return found
