"""A forwarder on the loopback interface between a SuperNode and its SuperLink: it counts bytes, may end TLS, and may keep what it reads."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fedsb.federation.certificates import certify

PIECE = 2**16
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Forwarder:
    """Passes connections on.

    Attributes:
        address: ``HOST:PORT`` at which it listens.
        up: bytes from whoever connects to the target.
        down: bytes back.
        kept: what was passed on, by connection and way.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.address = ""
        self.up = self.down = 0
        self.kept: list[bytearray] = []

    async def serve(self, context: ssl.SSLContext | None, ready: threading.Event, over: asyncio.Event) -> None:
        """Listen until it is over."""
        async with await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=context) as door:
            self.address = "{}:{}".format(*door.sockets[0].getsockname())
            ready.set()
            await over.wait()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far, back = await asyncio.open_connection(*self._target)
            await asyncio.gather(self._pump(reader, back, 1), self._pump(far, writer, 0))
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, up: int) -> None:
        self.kept.append(kept := bytearray())
        with suppress(OSError):
            while piece := await source.read(PIECE):
                self.up += up * len(piece)
                self.down += (1 - up) * len(piece)
                kept.extend(piece)
                sink.write(piece)
                await sink.drain()
        sink.close()


@contextmanager
def forwarding(target: str, context: ssl.SSLContext | None = None) -> Iterator[Forwarder]:
    """Forward connections to ``HOST:PORT`` for the length of a block, from TLS where there is a context."""
    forwarder, ready = Forwarder(target), threading.Event()
    handle: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Event]] = {}

    async def run() -> None:
        handle["it"] = asyncio.get_running_loop(), asyncio.Event()
        await forwarder.serve(context, ready, handle["it"][1])

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield forwarder
    finally:
        loop, over = handle["it"]
        loop.call_soon_threadsafe(over.set)
        thread.join(20)


class Wire(NamedTuple):
    """A line between a SuperNode that speaks TLS and a SuperLink that does not.

    Attributes:
        outside: what is on the wire, TLS included.
        inside: the same without TLS.
        authority: the certificate that the SuperNode needs.
    """

    outside: Forwarder
    inside: Forwarder
    authority: Path


@contextmanager
def wired(target: str, folder: Path) -> Iterator[Wire]:
    """Lay a wire to ``HOST:PORT``; its certificates lie in a folder."""
    authority, _, certificate, secret = certify(folder, [])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, secret)
    with forwarding(target, context) as inside, forwarding(inside.address) as outside:
        yield Wire(outside, inside, authority)
