"""A Flower ``Grid`` over Ray actors: dead actors are replaced and their messages sent again, hung ones ended.

Messages are handed out in the order in which they were pushed (the strategies push the largest clients first), to whichever actor is idle,
and never so far ahead of the oldest open one that replies pile up at the reducer: it adds them in that order, and what it holds back is
O(workers), not O(clients).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import Message
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from fedsb.core.errors import RunError
from fedsb.core.logs import Line, last_line, retell
from fedsb.runtime.grid import QUERY, TRAIN, SimulationGrid, failure, simulated_nodes
from fedsb.runtime.pool import Pool

LOG = logging.getLogger(__name__)
AHEAD = 4  # messages an actor that may be handed out beyond the oldest open one
LOOK_S = 1.0  # between two looks at what hangs


@dataclass
class Task:
    """Messages on their way to one actor.

    Attributes:
        messages: one, or several training messages that are answered at once.
        number: the first one's place in the order of dispatch.
        push: with which ones they came; what is sent again comes alone, at a time that nobody can foretell.
        tries: how often they were handed out.
        actor: who works on it.
        deadline: when it counts as hung.
    """

    messages: list[Message]
    number: int
    push: int
    tries: int = 0
    actor: ActorHandle | None = None
    deadline: float = float("inf")

    @property
    def ids(self) -> set[str]:
        """The ids of its messages."""
        return {message.metadata.message_id for message in self.messages}

    @property
    def clients(self) -> str:
        """Whom its messages are for."""
        told = [message.content.config_records.get("config") for message in self.messages]
        return ", ".join("all clients" if config is None else str(config.get("client", "all clients")) for config in told)

    def stacks_with(self, other: Task) -> bool:
        """Tell whether two can be answered together: training messages of one push, on their first try."""
        fresh = not self.tries and not other.tries and self.push == other.push
        return fresh and all(task.messages[0].metadata.message_type == TRAIN for task in (self, other))

    def failures(self, reason: str) -> Iterator[Message]:
        """Yield the replies of clients that failed."""
        return (failure(message, reason) for message in self.messages)


class RayGrid(SimulationGrid):
    """Serves simulated nodes with a pool of actors.

    Args:
        pool: the actors.
        run_config: what a client's context carries as run configuration.
        node_configs: one node configuration a node, by node id.
        max_retries: how often a message is sent again whose actor died.
        client_timeout: seconds after which a client that trains or evaluates counts as hung and failed; None waits.
        stack: training messages that an actor answers at once; where it hangs, or dies again and again, each goes out alone.
    """

    def __init__(
        self,
        pool: Pool,
        run_config: dict[str, Any],
        node_configs: dict[int, dict[str, Any]],
        *,
        max_retries: int = 2,
        client_timeout: float | None = None,
        stack: int = 1,
    ) -> None:
        super().__init__(run_config, node_configs)
        self._pool = pool
        self.device, self.seat, self.remark = pool.placement.driver, pool.seat, pool.placement.remark(pool.size)
        self._max_retries = max_retries
        self._client_timeout = client_timeout
        self._stack = stack
        self._waiting: deque[Task] = deque()
        self._running: dict[ray.ObjectRef, Task] = {}
        self._pushed = 0
        self._unanswered: set[str] = set()

    @classmethod
    def simulation(cls, pool: Pool, run_config: dict[str, Any], num_nodes: int = 1, **options: Any) -> RayGrid:
        """Return a grid whose nodes serve any logical client."""
        return cls(pool, run_config, simulated_nodes(num_nodes), **options)

    def enqueue(self, message: Message) -> None:
        """Put a message behind the others."""
        self._pool.fill()
        self._waiting.append(Task([message], self._pushed, self.pushes))
        self._pushed += 1
        self._unanswered.add(message.metadata.message_id)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, after waiting a little for the first.

        A message that nobody asks for any more is not handed out, and not waited for.
        """
        wanted = set(message_ids)
        self._forget(wanted)
        self._hand_out()
        if self._waiting and not (self._running or self._pool.starting):
            raise RunError("no worker is left to hand a message to")
        replies = [*self._arrived(self._patience()), *self._expired()]
        self._unanswered.difference_update(reply.metadata.reply_to_message_id for reply in replies)
        self._hand_out()
        if self._waiting and not self._running and self._pool.start_is_late:
            raise RunError("no worker has started for minutes: others hold the cluster's CPUs; wait for them, or lower runtime.cpus")
        return [reply for reply in replies if reply.metadata.reply_to_message_id in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Return the replies that are there within ``timeout`` seconds."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        return self._pulled(messages, lambda: time.monotonic() < deadline)

    def close(self) -> None:
        """End what is still at work, so that whoever uses the pool next finds its actors free."""
        self._forget(set())

    def _forget(self, wanted: set[str]) -> None:
        """Drop what nobody asks for any more: a round that timed out must not keep the next one's actors."""
        if self._unanswered <= wanted:
            return
        self._unanswered &= wanted
        self._waiting = deque(task for task in self._waiting if task.ids & wanted)
        for ref, task in list(self._running.items()):
            if not task.ids & wanted:
                assert task.actor is not None
                del self._running[ref]
                self._pool.replace(task.actor)

    def _hand_out(self) -> None:
        oldest = min((task.number for task in self._running.values()), default=None)
        while self._waiting and self._pool.idle:
            if oldest is not None and self._waiting[0].number - oldest > AHEAD * self._pool.size * self._stack:
                return
            task = self._next()
            oldest = task.number if oldest is None else min(oldest, task.number)
            task.actor = self._pool.take()
            task.tries += 1
            task.deadline = time.monotonic() + self._limit(task)
            works = [
                self._pool.work(task.actor, message, self.node_configs[message.metadata.dst_node_id], self.run_config)
                for message in task.messages
            ]
            self._running[task.actor.answer.remote(works, LOG.getEffectiveLevel())] = task

    def _limit(self, task: Task) -> float:
        """Return the seconds after which a task counts as hung; a question has none, for a worker reads the data of all clients for it."""
        asks = task.messages[0].metadata.message_type.startswith(QUERY)
        return float("inf") if asks or self._client_timeout is None else self._client_timeout * len(task.messages)

    def _next(self) -> Task:
        """Take the next task, with those behind it that fit into one stack: the same ones, however many actors there are."""
        task = self._waiting.popleft()
        while len(task.messages) < self._stack and self._waiting and task.stacks_with(self._waiting[0]):
            task.messages += self._waiting.popleft().messages
        return task

    def _apart(self, task: Task) -> None:
        """Put the messages of a task back, each alone: the next try shows whose fault it is."""
        for i, message in reversed(list(enumerate(task.messages))):
            self._waiting.appendleft(Task([message], task.number + i, task.push, tries=task.tries))

    def _patience(self) -> float:
        nearest = min((task.deadline for task in self._running.values()), default=float("inf"))
        return max(0.0, min(LOOK_S, nearest - time.monotonic()))

    def _arrived(self, seconds: float) -> Iterator[Message]:
        """Wait until something is done, and yield the replies among it."""
        refs = [*self._running, *self._pool.starting]
        if not refs:
            return
        first, rest = ray.wait(refs, num_returns=1, timeout=seconds)
        done = first + (ray.wait(rest, num_returns=len(rest), timeout=0)[0] if first and rest else [])
        try:
            self._pool.came(ref for ref in done if ref not in self._running)
        except RayError as error:
            raise RunError(f"a worker does not start: {last_line(str(error))}") from None
        for ref in done:
            if ref in self._running:
                yield from self._collect(ref, self._running.pop(ref))

    def _collect(self, ref: ray.ObjectRef, task: Task) -> Iterator[Message]:
        assert task.actor is not None
        try:
            found: tuple[list[Message], list[Line]] = ray.get(ref)
        except RayTaskError as error:  # out of the actor's own code, which lives
            self._pool.give_back(task.actor, failed=True)
            yield from task.failures(last_line(str(error)))
        except RayError as error:  # it died, by itself, by Ray's memory monitor, or with its machine
            LOG.info("the worker of %s died in try %d (%s) and is replaced", task.clients, task.tries, last_line(str(error)))
            self._pool.replace(task.actor)
            if task.tries < self._max_retries:
                self._waiting.appendleft(task)
            elif task.tries == self._max_retries or len(task.messages) > 1:
                self._apart(task)
            else:
                yield from task.failures(f"the process of the worker ended {task.tries} times over it (runtime.max_retries)")
        else:
            self._pool.give_back(task.actor)
            replies, lines = found
            retell(lines, task.clients)
            yield from replies

    def _expired(self) -> Iterator[Message]:
        """End what has hung for too long; one alone is not tried again."""
        now = time.monotonic()
        for ref, task in [(ref, task) for ref, task in self._running.items() if task.deadline <= now]:
            assert task.actor is not None
            del self._running[ref]
            LOG.info("the worker of %s has hung for runtime.client_timeout=%g s and is replaced", task.clients, self._client_timeout)
            self._pool.replace(task.actor)
            if len(task.messages) > 1:
                self._apart(task)
            else:
                yield from task.failures(f"no reply within runtime.client_timeout={self._client_timeout:g} s")
