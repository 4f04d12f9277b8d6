"""A Flower ``Grid`` in one process: messages go to the ClientApp by a call, one after the other.

Replies are computed when they are pulled, so a reducer holds one upload at a time, or as many as train side by side.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from flwr.app import Message

from fedsb.runtime.grid import TRAIN, ClientCall, SimulationGrid, StackCall, answered, context_of, simulated_nodes


class LocalGrid(SimulationGrid):
    """Serves simulated nodes with one ClientApp.

    Args:
        client_app: called with a message and a context.
        run_config: what the context carries as run configuration.
        node_configs: one node configuration a node, by node id.
        stack: training messages that are answered at once, by ``together``.
        together: called with several messages and their contexts.
    """

    def __init__(
        self,
        client_app: ClientCall,
        run_config: dict[str, Any],
        node_configs: dict[int, dict[str, Any]],
        *,
        stack: int = 1,
        together: StackCall | None = None,
    ) -> None:
        super().__init__(run_config, node_configs)
        self._client_app = client_app
        self._stack = stack
        self._together = together
        self._queue: dict[str, tuple[int, Message]] = {}
        self._contexts = {node: context_of(node, config, run_config) for node, config in node_configs.items()}

    @classmethod
    def simulation(cls, client_app: ClientCall, run_config: dict[str, Any], num_nodes: int = 1, **options: Any) -> LocalGrid:
        """Return a grid whose nodes serve any logical client."""
        return cls(client_app, run_config, simulated_nodes(num_nodes), **options)

    def enqueue(self, message: Message) -> None:
        """Keep a message until its reply is asked for."""
        self._queue[message.metadata.message_id] = self.pushes, message

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer the first queued message among ``message_ids``, or the first few, in the order in which they were pushed."""
        wanted = set(message_ids)
        first = list(islice((queued for message_id, queued in self._queue.items() if message_id in wanted), self._stack))
        batch = [message for push, message in first if push == first[0][0]]
        if not self._together or any(message.metadata.message_type != TRAIN for message in batch):
            batch = batch[:1]
        for message in batch:
            del self._queue[message.metadata.message_id]
        contexts = [self._contexts[message.metadata.dst_node_id] for message in batch]
        if self._together and len(batch) > 1:
            return self._together(batch, contexts)
        return [answered(self._client_app, message, context) for message, context in zip(batch, contexts, strict=True)]
