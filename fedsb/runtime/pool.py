"""Ray actors that answer messages: started once a process, replaced when they die, fed with base models through the object store.

A pool outlives the run that made it, so the next job of a sweep finds Ray, the actors and their models warm.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ray
from flwr.app import ArrayRecord, Message, RecordDict
from ray.actor import ActorHandle
from ray.exceptions import RayError
from torch import nn

from fedsb.core.errors import UserError
from fedsb.core.logs import last_line
from fedsb.core.networks import use_networks
from fedsb.models.build import forget_models
from fedsb.runtime.cluster import start_placed
from fedsb.runtime.fab import LAUNCH_FOLDER, launch_folder
from fedsb.runtime.placement import fitting
from fedsb.runtime.sharing import join, share_arrays, split
from fedsb.runtime.worker import Work, Worker, with_content

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
        use_networks(self._network)
        forget_models()
        self._failures = 0
        self._last_start = time.monotonic()
        # On this machine one core is left to this process, which has seconds of its own work before the first message.
        spare = max(1, (os.cpu_count() or 1) - 1) if settings.address is None else self.size
        self._to_come = max(0, self.size - spare)
        for _ in range(self.size - self._to_come):
            self._start()

    def fill(self) -> None:
        """Start the actors that were put off until there is something to do for them."""
        while self._to_come:
            self._to_come -= 1
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
        return Work(with_content(message, light), shared, node_config, run_config, self.networks if models else None, environment)

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
        use_networks(None)
        # Its weights may lie in the store that is about to go.
        forget_models()
        ray.shutdown()
