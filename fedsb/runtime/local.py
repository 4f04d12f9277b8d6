"""A Flower ``Grid`` in one process: messages go to the ClientApp by a call, one after the other.

Replies are computed when they are pulled, so a reducer holds one upload at a time. flwr 1.41 wants a process-wide
``TaskIdentity`` before a message is built outside its own runtimes; that private setting is touched here and nowhere else.
"""

from __future__ import annotations

import traceback
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

CLIENT_RAISED = 2  # Flower's code for an exception in the ClientApp
ClientCall = Callable[[Message, Context], Message]


def claim_identity() -> None:
    """Let this process build instruction messages outside Flower's runtimes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


class LocalGrid(Grid):
    """Serves ``num_nodes`` simulated nodes with one ClientApp.

    Args:
        client_app: called with a message and a context.
        run_config: what the context carries as run configuration.
        node_configs: one node configuration a node, by node id.
    """

    def __init__(self, client_app: ClientCall, run_config: dict[str, Any], node_configs: dict[int, dict[str, Any]]) -> None:
        claim_identity()
        self._client_app = client_app
        self._queue: dict[str, Message] = {}
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config=run_config)
            for node, config in node_configs.items()
        }

    @classmethod
    def simulation(cls, client_app: ClientCall, run_config: dict[str, Any], num_nodes: int = 1) -> LocalGrid:
        """Return a grid whose nodes serve any logical client."""
        configs = {i + 1: {"partition-id": i, "num-partitions": num_nodes} for i in range(num_nodes)}
        return cls(client_app, run_config, configs)

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """There is no run record here."""
        return None

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Build a message; Flower's own constructor is the better way."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the node ids."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self._queue[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the first queued message among ``message_ids``, in the order in which they were pushed."""
        wanted = set(message_ids)
        first = next((message_id for message_id in self._queue if message_id in wanted), None)
        return [self._answer(self._queue.pop(first))] if first is not None else []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Answer all messages."""
        ids = self.push_messages(messages)
        return [reply for message_id in ids for reply in self.pull_messages([message_id])]

    def _answer(self, message: Message) -> Message:
        context = self._contexts[message.metadata.dst_node_id]
        try:
            return self._client_app(message, context)
        except Exception:  # a client's failure costs its reply and nothing else
            return Message(Error(CLIENT_RAISED, traceback.format_exc()), reply_to=message)
