"""Questions to nodes about themselves, answered while the server goes on, and notices that a node writes to its own log."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedsb.core.logs import last_line
from fedsb.node.refusals import shown
from fedsb.resident.flower import FLOWER, flower_version
from fedsb.runtime.grid import is_simulation
from fedsb.wire.messages import decode_reply

DESCRIBE, NOTICE = "query.describe", "query.notice"
NOTICE_S = 60.0  # for a notice to arrive
DESCRIBE_S = 600.0  # for a node to read its data
SILENCES = 3  # a node that stays silent is left alone after so many, or it would hold up every round
AGAIN_S = (1.0, 10.0, 30.0)  # from a refusal to the next question, the last one over and over: its operator may have mended it


@dataclass(frozen=True)
class Description:
    """What a node says of itself.

    Attributes:
        client: whom it serves; empty for a simulated node.
        counts: training examples by client.
        trouble: why it does not serve; empty where it does.
        rank: of its client's factors; None where it leaves that to the run.
        resident: whether a worker of its operator's answered.
    """

    client: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    trouble: str = ""
    rank: int | None = None
    resident: bool = False


class Questions:
    """Asks nodes whom they serve, and takes the answers as they come.

    Args:
        labels: class names, which nodes need to read their data.
        timeout: seconds to wait for a node's answer.
        overrides: of the run that is resumed, for nodes that don't see its folder; None for another run.
        dealt: what simulated nodes would count; None: they are asked.
    """

    def __init__(
        self,
        labels: Sequence[str],
        timeout: float,
        overrides: str | None = None,
        dealt: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        self._told = {"labels": json.dumps(tuple(labels)), FLOWER: flower_version()}
        self._told |= {} if overrides is None else {"overrides": overrides}
        self._timeout = min(timeout, DESCRIBE_S)
        self._dealt = dealt
        self._known: list[tuple[int, Description]] = []  # of simulated nodes, whom nobody need ask
        self._pending: dict[str, tuple[int, float]] = {}  # node and deadline by message
        self._notices: dict[str, float] = {}  # deadline by message; the answers say nothing
        self._tries: Counter[int] = Counter()
        self._silences: Counter[int] = Counter()
        self._next: dict[int, float] = {}  # when to ask a node again

    @property
    def open(self) -> bool:
        """Whether a node has been asked and has not answered."""
        return bool(self._pending)

    @property
    def idle(self) -> bool:
        """Whether every question is answered, and every notice has arrived: what is under way when a run ends is lost."""
        return not self._pending and all(deadline <= time.monotonic() for deadline in self._notices.values())

    def unanswered(self) -> dict[int, float]:
        """Return the nodes that have been asked and have not answered, each with the seconds since."""
        now = time.monotonic()
        return {node: now - (deadline - self._timeout) for node, deadline in self._pending.values()}

    def ask(self, grid: Grid, nodes: Sequence[int], clients: Sequence[str]) -> None:
        """Ask those of ``nodes`` whose turn it is whom they serve; a simulated one counts the examples of ``clients``."""
        if self._dealt is not None and nodes and is_simulation(grid):
            # A worker takes seconds to start, and would read the data to count what the server has dealt out itself.
            self._known += [(node, Description(counts=self._dealt())) for node in nodes]
            return
        asked = {node for node, _ in self._pending.values()}
        due = [node for node in nodes if node not in asked and self._next.get(node, 0.0) <= time.monotonic()]
        # One simulated node counts the examples for all clients; asking each would read the data once more in every worker.
        messages = [self._question(node, clients if place == 0 else ()) for place, node in enumerate(due)]
        pushed = list(grid.push_messages(messages)) if messages else []
        deadline = time.monotonic() + self._timeout
        self._pending |= {message_id: (node, deadline) for message_id, node in zip(pushed, due, strict=True) if message_id}

    def forget(self, nodes: Collection[int]) -> None:
        """Forget how often nodes have been silent or in trouble: they come new, or come back."""
        for node in nodes:
            self._silences.pop(node, None)
            self._tries.pop(node, None)
            self._next.pop(node, None)

    def _question(self, node: int, clients: Sequence[str]) -> Message:
        return Message(RecordDict({"config": ConfigRecord({**self._told, "clients": json.dumps(tuple(clients))})}), node, DESCRIBE)

    def answers(self, grid: Grid) -> Iterator[tuple[int, Description]]:
        """Yield what nodes have said by now, and of those whose time is over that they have said nothing."""
        while self._known:
            yield self._known.pop()
        while (wanted := [*self._pending, *self._notices]) and (arrived := list(grid.pull_messages(wanted))):
            for reply in arrived:
                self._notices.pop(reply.metadata.reply_to_message_id, None)
                if asked := self._pending.pop(reply.metadata.reply_to_message_id, None):
                    yield asked[0], self._noted(asked[0], read_description(reply))
        for message_id, (node, deadline) in list(self._pending.items()):
            if deadline <= time.monotonic():
                del self._pending[message_id]
                self._silences[node] += 1
                yield node, self._noted(node, Description(trouble=f"no answer in {self._timeout:g} s"))

    def notify(self, grid: Grid, node: int, text: str) -> None:
        """Send a node a line for its own log."""
        message = Message(RecordDict({"config": ConfigRecord({"notice": text})}), node, NOTICE)
        deadline = time.monotonic() + min(self._timeout, NOTICE_S)
        self._notices |= {message_id: deadline for message_id in grid.push_messages([message]) if message_id}

    def _noted(self, node: int, said: Description) -> Description:
        """Set when to ask a node again that does not serve."""
        pause = AGAIN_S[min(self._tries[node], len(AGAIN_S) - 1)]
        self._tries[node] = self._tries[node] + 1 if said.trouble else 0
        self._next[node] = float("inf") if self._silences[node] >= SILENCES else time.monotonic() + pause
        return said


def read_description(reply: Message) -> Description:
    """Read the answer to a question; one that makes no sense is a trouble like any other."""
    if reply.has_error():
        return Description(trouble=last_line(reply.error.reason))
    try:
        return _read(reply.content)
    except (KeyError, TypeError, ValueError) as error:
        return Description(trouble=f"an answer that can't be read ({type(error).__name__}: {error})")


def _read(content: RecordDict) -> Description:
    metrics = content.metric_records["metrics"]
    config = content.config_records.get("config", ConfigRecord())
    if "code" in metrics:
        answer = decode_reply(content)
        return Description(client=str(config.get("client", "")), trouble=f"code {answer.code}, {shown(answer.code, answer.key)}")
    names = [str(name) for name in json.loads(str(config["counted"]))]
    counts = [int(n) for n in metrics["num-examples"]]  # type: ignore[union-attr]
    rank = int(config["rank"]) if "rank" in config else None  # type: ignore[arg-type]
    return Description(str(config["client"]), dict(zip(names, counts, strict=True)), rank=rank, resident="resident" in config)
