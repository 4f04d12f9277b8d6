"""Which node serves which logical client.

A simulated node serves anyone; a node of a real federation serves the client that its operator named. Nodes are asked once,
when they are first seen, by a ``query.describe`` message.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsb.errors import RunError
from fedsb.logs import last_line
from fedsb.messages import decode_reply
from fedsb.privacy.codes import shown

LOG = logging.getLogger(__name__)
DESCRIBE = "query.describe"
DESCRIBE_S = 600.0  # for a node to read its data
DESCRIBE_TRIES = 3  # a node that stays silent is left alone after so many, or it would hold up every round


class Roster:
    """The nodes of a federation.

    Attributes:
        clients: names of the logical clients.
        num_examples: training examples by client, as far as known.

    Args:
        clients: names of the logical clients.
        labels: class names, which clients need to read their data.
        timeout: seconds to wait for a node's answer.
        one_kind: refuse simulated nodes beside those of a real federation: the noise of a private run comes from the seed on the former.
    """

    def __init__(self, clients: Sequence[str], labels: Sequence[str], *, timeout: float, one_kind: bool = False) -> None:
        self._one_kind = one_kind
        self.clients = tuple(clients)
        self.num_examples: dict[str, int] = {}
        self._labels = tuple(labels)
        self._timeout = timeout
        self._seen: set[int] = set()
        self._asked: Counter[int] = Counter()
        self._silent: dict[int, str] = {}  # nodes that answered, but not with whom they serve, and what they said
        self._online: set[int] = set()
        self._simulated: list[int] = []
        self._named: dict[str, int] = {}
        self._pool: list[int] = []  # simulated nodes that are online
        self._places = {client: place for place, client in enumerate(self.clients)}

    def wait(self, grid: Grid, seconds: float, at_least: int) -> None:
        """Look for nodes until every client is served, or until the time is over and ``at_least`` are.

        Raises:
            RunError: too few clients are served.
        """
        deadline = time.monotonic() + seconds
        self.refresh(grid)
        while len(self.served()) < len(self.clients) and time.monotonic() < deadline:
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))
            self.refresh(grid)
        if len(self.served()) < at_least:
            raise RunError(
                f"only {len(self.served())} of {len(self.clients)} clients are connected after {seconds:g} s, {at_least} are needed; "
                f"missing: {self._missing()}"
            )

    def _missing(self) -> str:
        """Name the clients that nobody serves, and why as far as it is known."""
        absent = sorted(set(self.clients) - set(self.served()))
        named = f"{', '.join(absent[:8])}{' …' if len(absent) > 8 else ''}"
        if self._silent:
            node, said = next(iter(self._silent.items()))
            return f"{named}; a node that is connected fails to say whom it serves, and why its own log tells (node {node}: {said})"
        return f"{named} (name them with --node-config 'client=\"…\"')"

    @property
    def real(self) -> bool:
        """Whether a node of a real federation, which serves one named client, has been seen."""
        return bool(self._named)

    def served(self) -> list[str]:
        """Return the clients that a connected node serves."""
        return [client for client in self.clients if self.node_of(client) is not None]

    def node_of(self, client: str) -> int | None:
        """Return the node to send a client's messages to, or None where it is absent."""
        if client in self._named and self._named[client] in self._online:
            return self._named[client]
        return self._pool[self._places[client] % len(self._pool)] if self._pool else None

    def refresh(self, grid: Grid) -> None:
        """Look which nodes are online, and ask the new ones whom they serve."""
        self._online = set(grid.get_node_ids())
        self._ask_new(grid)
        self._pool = [node for node in self._simulated if node in self._online]

    def _ask_new(self, grid: Grid) -> None:
        new = sorted(node for node in self._online - self._seen if self._asked[node] < DESCRIBE_TRIES)
        if not new:
            return
        # One simulated node counts the examples for all clients; asking each would read the data once more in every worker.
        self._asked.update(new)
        for node, reply in self._ask(grid, new[:1], self.clients) + self._ask(grid, new[1:], ()):
            try:
                if reply.has_error():
                    raise ValueError(last_line(reply.error.reason))
                self._note(node, reply.content)
                self._seen.add(node)
                self._silent.pop(node, None)
            except (KeyError, TypeError, ValueError) as error:
                self._silent[node] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                LOG.warning("node %d did not describe itself: %s", node, self._silent[node])

    def _ask(self, grid: Grid, nodes: Sequence[int], clients: Sequence[str]) -> list[tuple[int, Message]]:
        if not nodes:
            return []
        content = RecordDict({"config": ConfigRecord({"clients": json.dumps(clients), "labels": json.dumps(self._labels)})})
        messages = [Message(content, node, DESCRIBE) for node in nodes]
        replies = list(grid.send_and_receive(messages, timeout=min(self._timeout, DESCRIBE_S)))
        by_message = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        return [(by_message.get(r.metadata.reply_to_message_id, r.metadata.src_node_id), r) for r in replies]

    def _note(self, node: int, content: RecordDict) -> None:
        if "code" in content.metric_records["metrics"]:
            answer = decode_reply(content)
            raise ValueError(shown(answer.code, answer.key))
        config: ConfigRecord = content.config_records["config"]
        counts: MetricRecord = content.metric_records["metrics"]
        client = str(config["client"])
        names = [str(name) for name in json.loads(str(config["counted"]))]
        self.num_examples |= dict(zip(names, (int(n) for n in counts["num-examples"]), strict=True))  # type: ignore[union-attr]
        if not client:
            self._simulated.append(node)
        elif client in self.clients:
            self._named[client] = node
        else:
            LOG.warning("node %d serves '%s', which is no client of this run; known: %s", node, client, ", ".join(self.clients[:8]))
        if self._one_kind and self._named and self._simulated:
            raise RunError(
                "some nodes of this private run name the client they serve and some do not; start every one with "
                "--node-config 'client=\"…\"', or none: without it a node's noise comes from the public seed"
            )
