"""What the project's own grids have in common: simulated nodes, and messages built outside Flower's runtimes.

flwr 1.41 and 1.42 want a process-wide ``TaskIdentity`` before a message is built outside their own runtimes; that private setting is
touched here and nowhere else.
"""

from __future__ import annotations

import traceback
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedsb.runtime.placement import Seat

CLIENT_RAISED = 2  # Flower's code for an exception in the ClientApp
RUN_ID = 1
TRAIN = "train"  # the messages that several clients can answer at once
SIMULATED: dict[str, Any] = {"partition-id": 0, "num-partitions": 1}  # what Flower's simulation tells a node, and nothing else
QUERY = "query"  # how the types begin of those that ask a node about itself
ClientCall = Callable[[Message, Context], Message]
StackCall = Callable[[Sequence[Message], Sequence[Context]], list[Message]]


def claim_identity() -> None:
    """Let this process build instruction messages outside Flower's runtimes."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = RUN_ID


def context_of(node: int, node_config: dict[str, Any], run_config: dict[str, Any]) -> Context:
    """Return the context of a call: a node, its configuration, and that of the run."""
    return Context(run_id=RUN_ID, node_id=node, node_config=node_config, state=RecordDict(), run_config=run_config)


def answered(client_app: ClientCall, message: Message, context: Context) -> Message:
    """Return what a client answers; an exception costs its reply and nothing else."""
    try:
        return client_app(message, context)
    except Exception:
        return failure(message, traceback.format_exc())


def failure(message: Message, reason: str) -> Message:
    """Return the reply of a client that failed."""
    return Message(Error(CLIENT_RAISED, reason), reply_to=message)


class SimulationGrid(Grid):
    """Messages to simulated nodes. A subclass says how they are answered.

    Attributes:
        device: where the server computes; None: as configured.
        remark: a line about where clients and server compute, or nothing.
        seat: the memory that a client's computation shares with others; None: the server's own.

    Args:
        run_config: what a client's context carries as run configuration.
        node_configs: one node configuration a node, by node id.
    """

    def __init__(self, run_config: dict[str, Any], node_configs: dict[int, dict[str, Any]]) -> None:
        claim_identity()
        self.pushes = 0
        self.device: str | None = None
        self.seat: Seat | None = None
        self.remark = ""
        self.run_config = run_config
        self.node_configs = node_configs

    def close(self) -> None:
        """Leave nothing under way."""

    @abstractmethod
    def enqueue(self, message: Message) -> None:
        """Take a message, which has its id."""

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
        return sorted(self.node_configs)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Queue messages and return their ids."""
        ids = []
        self.pushes += 1
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self.enqueue(message)
        return ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies to all messages."""
        return self._pulled(messages, lambda: True)

    def _pulled(self, messages: Iterable[Message], wait: Callable[[], bool]) -> list[Message]:
        """Push messages and pull until all are answered or ``wait`` says no."""
        pending = set(self.push_messages(messages))
        replies: list[Message] = []
        while pending and wait():
            arrived = self.pull_messages(list(pending))
            pending -= {reply.metadata.reply_to_message_id for reply in arrived}
            replies += arrived
        return replies


def is_simulation(grid: Grid) -> bool:
    """Tell whether a grid's nodes are all simulated: that of Flower's simulation engine, or one of the project's own."""
    if isinstance(grid, SimulationGrid):
        return all(node.keys() == SIMULATED.keys() for node in grid.node_configs.values())
    # By name: flwr 1.42 has moved that class, and no deployment has it.
    return any(kind.__name__ == "InMemoryGrid" for kind in type(grid).__mro__)


def simulated_nodes(number: int = 1) -> dict[int, dict[str, Any]]:
    """Return the configurations of nodes that serve any logical client; one is enough, however many clients and workers there are."""
    return {i + 1: {**SIMULATED, "partition-id": i, "num-partitions": number} for i in range(number)}
