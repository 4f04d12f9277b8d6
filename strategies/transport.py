"""Messages to logical clients over a Flower grid: addressing, frozen catch-up, streaming replies, counting bytes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

from fedsb.core.blocks import WHOLE, Sight
from fedsb.privacy.codes import CODES
from fedsb.wire.byte_counts import array_bytes, float32_bytes, overhead_bytes, payload_bytes
from fedsb.wire.frozen import FrozenLog
from fedsb.wire.messages import Instruction, SharedPart, encode_instruction, encode_shared
from strategies.roster import Roster

Ask = Callable[[str], tuple[Instruction, ArrayRecord]]
BARE = (
    "train.keys",
    "train.shares",
    "train.survivors",
    "train.unmask",
)  # kinds that take no frozen parts with them, and say nothing of what is held
LOG = logging.getLogger(__name__)
MOST_FAILURES = 30  # of a SuperLink, before a run fails with it
POLL_S = (0.02, 0.5)  # between two looks for replies: first, and at most


@dataclass
class Tally:
    """Bytes that moved in a round: payload up, down and one-off, and the serialised rest."""

    up: int = 0
    down: int = 0
    one_off: int = 0
    overhead: int = 0


@dataclass(frozen=True)
class Request:
    """One message to one client. ``arrays`` is encoded once a round and shared by all messages that hold the same."""

    instruction: Instruction
    kind: str
    arrays: ArrayRecord
    tally: Tally

    @property
    def is_start(self) -> bool:
        """Whether the bytes of this request and its reply are spent once in a run."""
        return self.kind.endswith(".evidence")


@dataclass(frozen=True)
class CountedPart:
    """What travels to every holder of one version of the frozen log: bytes of the basis, which is sent once in a run, and of the rest."""

    shared: SharedPart
    basis: int
    rest: int


class Transport:
    """Sends requests and yields replies as they come.

    It knows which version of the frozen log each client holds. A client that turns out to lack more says so; it is sent the
    whole log and asked again, once a request, and those bytes count like any other.

    Args:
        grid: any Flower grid.
        roster: who is served by which node.
        frozen: the server's frozen log.
        held: versions that clients hold, by client; kept up to date.
        origin: names the run.
        begin_anew: whether a client that has lost what it kept of its own is asked to train from the start.
        sight_of: what each client sees of the factors that the server holds.
    """

    def __init__(
        self,
        grid: Grid,
        roster: Roster,
        frozen: FrozenLog,
        held: dict[str, int],
        origin: str = "",
        *,
        begin_anew: bool = False,
        sight_of: Callable[[str], Sight] = lambda client: WHOLE,
    ) -> None:
        self.grid = grid
        self.roster = roster
        self._frozen = frozen
        self._held = held
        self._origin = origin
        self._begin_anew = begin_anew
        self._sight_of = sight_of
        self._addressed: list[tuple[Message, Request]] = []
        self._by_id: dict[str, Request] = {}
        self._parts: dict[tuple[int, int, Sight], CountedPart] = {}
        self._caught_up: set[str] = set()
        self._failures = 0  # of questions for replies, one after the other

    def requests(self, clients: Sequence[str], kind: str, ask: Ask, tally: Tally) -> list[Request]:
        """Return one request a client, based on the frozen log as it stands; ``ask`` gives its instruction and its arrays."""
        return [
            Request(self._told(client, instruction), kind, arrays, tally) for client in clients for instruction, arrays in [ask(client)]
        ]

    def _told(self, client: str, instruction: Instruction) -> Instruction:
        told = replace(instruction, client=client, frozen=self._frozen.head)
        return replace(told, overrides=self.roster.overrides, origin=self._origin)

    def address(self, requests: Sequence[Request], failed: dict[str, str]) -> list[Message]:
        """Return the messages for the clients that are connected; note the others in ``failed``."""
        messages = []
        self._addressed = []
        self._by_id = {}
        self._parts = {}
        self._caught_up = set()
        for request in requests:
            node = self.roster.node_of(request.instruction.client)
            if node is None:
                failed[request.instruction.client] = self.roster.why(request.instruction.client)
                continue
            held = self._frozen.version if request.kind in BARE else self._held.get(request.instruction.client, 0)
            messages.append(self._message(request, node, held))
        return messages

    def client_of(self, reply: Message) -> str | None:
        """Return the client that a reply comes from, or None for a reply to something else."""
        request = self._request_of(reply)
        return request.instruction.client if request else None

    def _request_of(self, reply: Message) -> Request | None:
        wanted = reply.metadata.reply_to_message_id
        if wanted not in self._by_id:
            # A message gets its id from the grid, when it is pushed.
            self._by_id = {message.metadata.message_id: request for message, request in self._addressed}
        return self._by_id.get(wanted)

    def replies(self, messages: Sequence[Message], timeout: float) -> Iterator[Message]:
        """Push messages and yield replies as they arrive, until all are there or ``timeout`` seconds are over."""
        pending = self._push(messages)
        deadline = time.monotonic() + timeout
        pause = POLL_S[0]
        while pending and (looked := time.monotonic()) < deadline:
            arrived = self._pulled(pending)
            for reply in arrived:
                pending.discard(reply.metadata.reply_to_message_id)
                request = self._request_of(reply)
                if request is None:
                    continue
                self._count_reply(request, reply)
                if again := self._again(request, reply):
                    pending |= self._push([again])
                else:
                    yield reply
            pause = POLL_S[0] if arrived else min(2 * pause, POLL_S[1])
            if not arrived:
                # A grid that has waited by itself must not wait again: its workers would idle meanwhile.
                time.sleep(max(0.0, looked + pause - time.monotonic()))

    def _pulled(self, pending: Collection[str]) -> list[Message]:
        """Look for replies; a SuperLink that fails over the question is asked again, as its database may be busy for a moment."""
        try:
            found = list(self.grid.pull_messages(list(pending)))
        except Exception as error:
            self._failures += 1
            if not fails_there(error) or self._failures > MOST_FAILURES:
                raise
            LOG.warning("the SuperLink failed over a question for replies, and is asked again: %s", str(error).partition("\n")[0])
            return []
        self._failures = 0
        return found

    def _again(self, request: Request, reply: Message) -> Message | None:
        """Return what to send a client once more: the whole log to one that lacks some, and a start anew where that is allowed."""
        client, node = request.instruction.client, reply.metadata.src_node_id
        if _says(reply, "missing") and client not in self._caught_up:
            self._caught_up.add(client)
            return self._message(request, node, 0)
        own = request.instruction.own
        if own and self._begin_anew and request.kind == "train" and _says(reply, "code") == CODES["own_state"].number:
            why = f"for what it kept of its own in round {own} is not there (federation.lost_state=anew)"
            self.roster.remark(f"{client}: it begins anew, {why}")
            return self._message(replace(request, instruction=replace(request.instruction, own=0)), node, self._held[client])
        return None

    def _push(self, messages: Sequence[Message]) -> set[str]:
        # A grid returns None for what it could not push: that client will not have answered in time.
        return {message_id for message_id in self.grid.push_messages(messages) if message_id}

    def _message(self, request: Request, node: int, held: int) -> Message:
        part = self._part(request.arrays, held, self._frozen.seen_by(self._sight_of(request.instruction.client)))
        content = encode_instruction(request.instruction, part.shared)
        tally = request.tally
        tally.one_off += part.basis + (part.rest if request.is_start else 0)
        tally.down += 0 if request.is_start else part.rest
        tally.overhead += overhead_bytes(content)
        message = Message(content, node, request.kind)
        self._addressed.append((message, request))
        return message

    def _part(self, arrays: ArrayRecord, held: int, sight: Sight) -> CountedPart:
        """Encode what goes to the holders of one version, once for all of one rank: a bundle may outweigh the state many times."""
        key = id(arrays), held, sight
        if key not in self._parts:
            bundle = self._frozen.bundle(held, sight)
            shared = encode_shared(arrays, bundle)
            basis = float32_bytes(bundle.one_off) if bundle else 0
            self._parts[key] = CountedPart(shared, basis, array_bytes(shared.arrays) - basis)
        return self._parts[key]

    def _count_reply(self, request: Request, reply: Message) -> None:
        if reply.has_error():
            return
        if request.kind not in BARE:
            self._held[request.instruction.client] = self._frozen.version
        payload = payload_bytes(reply.content)
        request.tally.one_off += payload if request.is_start else 0
        request.tally.up += 0 if request.is_start else payload
        request.tally.overhead += overhead_bytes(reply.content)


def _says(reply: Message, key: str) -> object:
    """Return what a reply says under a key of its metrics; 0 where it says nothing."""
    found = reply.content.metric_records.get("metrics") if reply.has_content() else None
    return found.get(key, 0) if found else 0


def fails_there(error: BaseException) -> bool:
    """Tell whether an error is a server's own (HTTP 5xx), which says nothing of the question."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return isinstance(status, int) and status >= 500
