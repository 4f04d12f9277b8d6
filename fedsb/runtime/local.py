"""A Flower ``Grid`` in one process: messages go to the ClientApp by a call, one after the other.

Replies are computed when they are pulled, so a reducer holds one upload at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import Message

from fedsb.runtime.grid import ClientCall, SimulationGrid, answered, context_of, simulated_nodes


class LocalGrid(SimulationGrid):
    """Serves simulated nodes with one ClientApp.

    Args:
        client_app: called with a message and a context.
        run_config: what the context carries as run configuration.
        node_configs: one node configuration a node, by node id.
    """

    def __init__(self, client_app: ClientCall, run_config: dict[str, Any], node_configs: dict[int, dict[str, Any]]) -> None:
        super().__init__(run_config, node_configs)
        self._client_app = client_app
        self._queue: dict[str, Message] = {}
        self._contexts = {node: context_of(node, config, run_config) for node, config in node_configs.items()}

    @classmethod
    def simulation(cls, client_app: ClientCall, run_config: dict[str, Any], num_nodes: int = 1) -> LocalGrid:
        """Return a grid whose nodes serve any logical client."""
        return cls(client_app, run_config, simulated_nodes(num_nodes))

    def enqueue(self, message: Message) -> None:
        """Keep a message until its reply is asked for."""
        self._queue[message.metadata.message_id] = message

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the first queued message among ``message_ids``, in the order in which they were pushed."""
        wanted = set(message_ids)
        first = next((message_id for message_id in self._queue if message_id in wanted), None)
        if first is None:
            return []
        message = self._queue.pop(first)
        return [answered(self._client_app, message, self._contexts[message.metadata.dst_node_id])]
