"""Ray actors that answer messages: started once a process, replaced when they die, fed with base models through the object store.

A pool outlives the run that made it, so the next job of a sweep finds Ray, the actors and their models warm.
"""

from __future__ import annotations

import logging
import os
import pkgutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, RecordDict
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import nn

from fedsb.core.errors import UserError
from fedsb.core.logs import Line, last_line, overheard
from fedsb.models import loading
from fedsb.models.build import forget_models
from fedsb.runtime.cluster import start_placed
from fedsb.runtime.fab import LAUNCH_FOLDER, launch_folder
from fedsb.runtime.grid import answered, claim_identity, context_of
from fedsb.runtime.placement import fitting
from fedsb.runtime.sharing import join, share_arrays, split

LOG = logging.getLogger(__name__)
# A client reads these from its process, which started with those of the run that started Ray.
HANDED_ON = ("FEDSB_HOME", "HF_HUB_OFFLINE", "HF_HOME")
LATE_S = 180.0  # to start an actor takes a few seconds, on a busy machine half a minute
MOST_FAILURES = 3  # actors in a row that die while they start
KEPT = 2  # base models, and heavy records, in the object store at a time


@dataclass(frozen=True)
class PoolSettings:
    """What a pool is made of.

    Attributes:
        client: ``module:attribute`` of the ClientApp.
        together: the same of what answers several training messages at once.
        workers: number of actors; None takes as many as the cluster holds.
        cpus: number of CPUs that each one reserves.
        gpus: share of a GPU that each one reserves; None: one where there are any.
        device: as configured; the driver's follows from it and from what workers leave.
        address: of an existing cluster; None starts Ray on this machine.
    """

    client: str
    together: str = ""
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None
    device: str = "auto"
    address: str | None = None


@dataclass(frozen=True)
class Work:
    """A message as it goes to an actor: what many share lies in the object store, by reference.

    Attributes:
        message: with the content that is its own.
        shared: further records of the content, by key; empty for the one that the actor has got last.
        networks: base models in the object store, by key; None for those that the actor has been told.
    """

    message: Message
    shared: Mapping[str, Sequence[ray.ObjectRef]]
    node_config: dict[str, Any]
    run_config: dict[str, Any]
    networks: Mapping[str, list[ray.ObjectRef]] | None
    environment: Mapping[str, str]


class Worker:
    """In the actor's process: a ClientApp, and base models mapped from the object store."""

    def __init__(self, client: str, together: str, cards: bool = True) -> None:
        if not cards:
            # Ray leaves all of them visible to an actor that reserves none.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        claim_identity()
        share_arrays()
        self._client = pkgutil.resolve_name(client)
        self._together = together
        self._networks: Mapping[str, list[ray.ObjectRef]] = {}
        self._shared: dict[str, ArrayRecord] = {}
        loading.use_networks(self._network)

    def answer(self, works: Sequence[Work], level: int) -> tuple[list[Message], list[Line]]:
        """Answer one message, or several at once, and return what was logged over it from a level on."""
        with overheard(level) as lines:
            return self._answer(works), lines

    def _answer(self, works: Sequence[Work]) -> list[Message]:
        messages = [self._unpacked(work) for work in works]
        contexts = [context_of(m.metadata.dst_node_id, work.node_config, work.run_config) for m, work in zip(messages, works, strict=True)]
        if len(works) > 1:
            replies: list[Message] = pkgutil.resolve_name(self._together)(messages, contexts)
            return replies
        return [answered(self._client, message, context) for message, context in zip(messages, contexts, strict=True)]

    def _unpacked(self, work: Work) -> Message:
        self._networks = self._networks if work.networks is None else work.networks
        os.environ.update(work.environment)
        records = {key: self._record(key, refs) for key, refs in work.shared.items()}
        return _with(work.message, RecordDict({**records, **work.message.content}))

    def _record(self, key: str, refs: Sequence[ray.ObjectRef]) -> ArrayRecord:
        """Fetch a record, or take the last one."""
        if refs:
            self._shared[key] = ray.get(refs[0])
        return self._shared[key]

    def call(self, function: Callable[..., Any], *arguments: Any, networks: Mapping[str, list[ray.ObjectRef]] | None = None) -> Any:
        """Run a function in the actor's process, with these base models at hand; for measurements."""
        self._networks = networks or self._networks
        return function(*arguments)

    def _network(self, key: str, load: Callable[[], nn.Module]) -> nn.Module:
        return join(ray.get(self._networks[key][0])) if key in self._networks else load()


class Pool:
    """The actors of one setting.

    Attributes:
        size: number of actors.
        placement: where they and this process compute.
        seat: the memory that a worker shares with others.

    Raises:
        UserError: no cluster at the address, or it cannot hold so many workers.
        RunError: Ray does not start on this machine.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self.placement = start_placed(settings.address, settings.device, settings.gpus, settings.workers)
        share_arrays()
        self._settings = settings
        try:
            self.size = fitting(settings.workers, settings.cpus, self.placement.share, ray.cluster_resources())
        except UserError:
            close_pools()
            raise
        self.seat = self.placement.seat(self.size, own=settings.address is None)
        self._idle: list[ActorHandle] = []
        self._coming: dict[ray.ObjectRef, ActorHandle] = {}
        self.networks: dict[str, list[ray.ObjectRef]] = {}
        self._told: dict[ActorHandle, dict[str, bytes]] = {}
        self._heavy: dict[int, tuple[ArrayRecord, ray.ObjectRef]] = {}
        loading.use_networks(self._network)
        forget_models()
        self._failures = 0
        self._last_start = time.monotonic()
        for _ in range(self.size):
            self._start()

    def _start(self) -> None:
        options = {"num_cpus": self._settings.cpus, "num_gpus": self.placement.share, "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(**options)(Worker).remote(self._settings.client, self._settings.together, self.placement.share > 0)
        self._coming[actor.__ray_ready__.remote()] = actor

    @property
    def starting(self) -> list[ray.ObjectRef]:
        """What to wait for while actors start."""
        return list(self._coming)

    @property
    def start_is_late(self) -> bool:
        """Whether none of the actors that are to start has done so for long: what they reserve is taken."""
        return bool(self._coming) and time.monotonic() - self._last_start > LATE_S

    @property
    def idle(self) -> bool:
        """Whether an actor waits for work."""
        return bool(self._idle)

    def came(self, refs: Iterable[ray.ObjectRef]) -> None:
        """Take in the actors that are ready now; one that died while it started is replaced.

        Raises:
            ray.exceptions.RayError: several in a row did.
        """
        for ref in refs:
            actor = self._coming.pop(ref)
            try:
                ray.get(ref)
            except RayError as error:
                LOG.info("a worker died while it started and is replaced: %s", last_line(str(error)))
                self.replace(actor)
                self._failures += 1
                if self._failures > MOST_FAILURES:
                    raise
            else:
                self._failures = 0
                self._last_start = time.monotonic()
                self._idle.append(actor)

    def take(self) -> ActorHandle:
        """Return an idle actor."""
        return self._idle.pop()

    def give_back(self, actor: ActorHandle, *, failed: bool = False) -> None:
        """Take an actor back that has done its work, or failed at it and may not have taken in what it was told."""
        if failed:
            self._told.pop(actor, None)
        self._idle.append(actor)

    def replace(self, actor: ActorHandle) -> None:
        """End an actor, dead or alive, and start another one in its place."""
        ray.kill(actor)
        self._told.pop(actor, None)
        self._last_start = time.monotonic()
        self._start()

    def work(self, actor: ActorHandle, message: Message, node_config: dict[str, Any], run_config: dict[str, Any]) -> Work:
        """Pack a message; records of arrays go to the object store, once for all messages that share them.

        An actor is told of a reference once: each that travels is counted by every process that sees it.
        """
        shared = {key: self._news(actor, key, [self._stored(record)]) for key, record in message.content.array_records.items()}
        models = self._news(actor, "", [ref for refs in self.networks.values() for ref in refs])
        light = RecordDict({key: record for key, record in message.content.items() if key not in shared})
        environment = {name: os.environ[name] for name in HANDED_ON if name in os.environ} | {LAUNCH_FOLDER: str(launch_folder())}
        return Work(_with(message, light), shared, node_config, run_config, self.networks if models else None, environment)

    def _news(self, actor: ActorHandle, key: str, refs: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """Return references, or none where they are what the actor was told last."""
        told, ids = self._told.setdefault(actor, {}), b"".join(ref.binary() for ref in refs)
        if told.get(key) == ids:
            return []
        told[key] = ids
        return refs

    def _stored(self, record: ArrayRecord) -> ray.ObjectRef:
        if id(record) not in self._heavy:
            while len(self._heavy) >= KEPT:
                self._heavy.pop(next(iter(self._heavy)))
            # The record is kept with its reference: an id is only its own while it lives.
            self._heavy[id(record)] = record, ray.put(record)
        return self._heavy[id(record)][1]

    def _network(self, key: str, load: Callable[[], nn.Module]) -> nn.Module:
        """Lay a base model into the object store, once, and use it from there, in this process too."""
        if key not in self.networks:
            parts = split(load())
            while len(self.networks) >= KEPT:
                self.networks.pop(next(iter(self.networks)))
            self.networks[key] = [ray.put(parts)]
        return join(ray.get(self.networks[key][0]))


_POOLS: dict[PoolSettings, Pool] = {}


def pool_for(settings: PoolSettings) -> Pool:
    """Return the process's pool of these settings; one of other settings is ended first."""
    if settings not in _POOLS:
        if _POOLS:
            close_pools()
        _POOLS[settings] = Pool(settings)
    return _POOLS[settings]


def pools() -> list[Pool]:
    """Return the process's pools."""
    return list(_POOLS.values())


def close_pools() -> None:
    """End Ray and every pool in this process."""
    if _POOLS or ray.is_initialized():
        _POOLS.clear()
        loading.use_networks(None)
        # Its weights may lie in the store that is about to go.
        forget_models()
        ray.shutdown()


def _with(message: Message, content: RecordDict) -> Message:
    """Return a message with other content, and the id that the first one has."""
    return Message(content=content, metadata=message.metadata)  # type: ignore[call-overload, no-any-return]
