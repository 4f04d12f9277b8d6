"""What the tests of Ray share: their marks, pools of actors, and federations over a pool some of whose actors are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from shlex import join
from typing import Any

import psutil
import pytest
import ray
from flwr.app import Message

from fedsb import client_app, client_stack
from fedsb.config.compose import load
from fedsb.models.build import forget_models
from fedsb.runtime.grid import simulated_nodes
from fedsb.runtime.grids import CLIENT, TOGETHER
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.pool import Pool, PoolSettings, pool_for
from fedsb.runtime.ray import RayGrid
from fedsb.server_app import serve

RAY = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ended"),
    # Ray leaves its log files and child processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
OBEYING = PoolSettings("tests.runtime.apps:obey", "tests.runtime.apps:obey_all", workers=2, cpus=0.5)
TRAINING = PoolSettings(CLIENT, TOGETHER, workers=3, cpus=0.5, device="cpu")


def ready(pool: Pool) -> Pool:
    """Wait until all actors of a pool are there."""
    pool.fill()
    while pool.starting:
        pool.came(ray.wait(pool.starting, num_returns=1)[0])
    return pool


def processes(pool: Pool) -> list[int]:
    """Return the process of each actor of a pool that is ready and has nothing to do."""
    found: list[int] = ray.get([actor.call.remote(os.getpid) for actor in pool._idle])
    return sorted(found)


class Killing(RayGrid):
    """Kills, by its process, an actor at work, when it has handed out so many replies; any, where none is seen at it: work is short."""

    kills: tuple[int, ...] = ()
    replies = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.kills and self.replies >= self.kills[0] and (busy := working() or (idle() if self._running else [])):
            self.kills = self.kills[1:]
            os.kill(busy[0], signal.SIGKILL)
        found = super().pull_messages(message_ids)
        self.replies += len(found)
        return found


def working() -> list[int]:
    """Return the processes of this one's actors that are answering a message."""
    return named("ray::Worker.answer")


def idle() -> list[int]:
    """Return the processes of actors that are not."""
    return named("ray::Worker")


def named(title: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * (process.cmdline()[:1] == [title])
    return found


def federate(folder: Path, overrides: Sequence[str], kills: tuple[int, ...] | None = None, stack: int = 1) -> dict[str, Any]:
    """Run a federation in this process, or on three actors, some of which are killed, and return its summary."""
    run_config = {"overrides": join(overrides), "output": str(folder)}
    if kills is None:
        together = client_stack.answer_together
        return serve(load(list(overrides)), LocalGrid.simulation(client_app.app, run_config, stack=stack, together=together), folder)
    pool = pool_for(TRAINING)
    grid = Killing(pool, run_config, simulated_nodes(), stack=stack)
    grid.kills = kills
    try:
        forget_models()  # of the run in this process, or nothing would be shared
        return serve(load(list(overrides)), grid, folder)
    finally:
        assert not grid.kills
        assert pool.networks
