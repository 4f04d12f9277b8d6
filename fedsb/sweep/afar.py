"""Jobs on the machines of a Ray cluster: each is a task of its own, which Ray places where CPUs, memory and GPUs are free.

The machines see the sweep's folder, the model and the data at the same paths, and have the sources and versions that the sweep was begun
with; one that does not fails its job, with a line. A process, or a machine, that dies takes its jobs with it and no other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from fedsb.core.errors import UserError
from fedsb.core.logs import last_line
from fedsb.report.summary import versions
from fedsb.runtime.cluster import start_ray
from fedsb.sweep.crew import LOOK_S, PATIENCE_S, Event, Task, print_to
from fedsb.sweep.manifest import MANIFEST, code_hash, read

# Of the variables of this process those that decide where models and data come from; the others are a machine's own.
HANDED_ON = ("FEDSB_", "HF_", "TRANSFORMERS_", "FLWR_", "TOKENIZERS_")
MISTAKE = 2


@dataclass(frozen=True)
class Needs:
    """What a job reserves of a machine: CPUs, bytes of memory, GPUs."""

    cpus: int
    memory: int
    cards: int = 0

    def fit(self) -> int:
        """Return how many such jobs the cluster takes at a time, over its machines."""
        return sum(self._on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _on(self, machine: Mapping[str, float]) -> int:
        room = {"CPU": self.cpus, "memory": self.memory, **({"GPU": self.cards} if self.cards else {})}
        return int(min(machine.get(name, 0) // each for name, each in room.items()))


class RayCrew:
    """Runs jobs as :class:`fedsb.sweep.crew.Crew` does; leave it through ``with``, which ends those that run.

    Args:
        size: jobs at a time.
        task: what is done; its environment is the machine's own, but for :data:`HANDED_ON`.
        needs: of a job.
    """

    def __init__(self, size: int, task: Task, needs: Needs) -> None:
        handed = {name: value for name, value in task.environment.items() if name.startswith(HANDED_ON)}
        self._size, self._task = size, replace(task, environment=handed)  # what else is in it, keys of clouds say, is nobody's there
        options = {"num_cpus": needs.cpus, "memory": needs.memory, "num_gpus": needs.cards, "max_retries": 0}
        self._run = ray.remote(**options, runtime_env={"env_vars": handed})(_serve)
        self._jobs: dict[Any, tuple[int, float]] = {}

    def __enter__(self) -> RayCrew:
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._jobs:
            ray.cancel(task)
        _, late = ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=PATIENCE_S) if self._jobs else ([], [])
        for task in late:
            ray.cancel(task, force=True)
        ray.shutdown()

    def run(self, jobs: Sequence[int]) -> Iterator[Event]:
        """Run jobs in their order, and yield what happens to them, at least once a second."""
        left = list(jobs)
        while left or self._jobs:
            while left and len(self._jobs) < self._size:
                job = left.pop(0)
                self._jobs[self._run.remote(self._task, job)] = job, time.monotonic()
                yield Event(job)
            ended, _ = ray.wait(list(self._jobs), timeout=LOOK_S)
            for task in ended:
                job, begun = self._jobs.pop(task)
                yield Event(job, *_outcome(task), time.monotonic() - begun)
            yield Event()


def join(address: str) -> bool:
    """Join a cluster, and tell whether it has GPUs.

    Raises:
        UserError: there is none at the address.
    """
    start_ray(address, key="sweep.address")
    return bool(ray.cluster_resources().get("GPU", 0))


def _outcome(task: Any) -> tuple[int, str]:
    """Return how a task ended: the job's status, and what the job itself could not note in the sweep's folder."""
    try:
        status, reason = ray.get(task)
    except ray.exceptions.RayError as error:
        return 1, f"its process died ({type(error).__name__}: {last_line(str(error))[:160]})"
    return int(status), str(reason)


def _serve(task: Task, job: int) -> tuple[int, str]:
    """On a machine of the cluster: run a job, where it can be run there to the same bits."""
    folder, here = task.printed[job].parent.parent, socket.gethostname()
    if not (folder / MANIFEST).is_file():
        return MISTAKE, f"{here} does not see '{folder}': the machines of a cluster share the sweep's folder, at one path"
    try:
        manifest = read(folder)
    except UserError as error:
        return MISTAKE, f"{here}: {error}"
    if differ := _other(manifest.code, manifest.versions):
        return MISTAKE, f"{here} has {differ} than the sweep was begun with"
    if task.place.is_dir():
        os.chdir(task.place)
    print_to(task.printed[job])
    return task.run(job), ""


def _other(code: str, known: Mapping[str, str]) -> str:
    if code != code_hash():
        return "other sources of fedsb"
    found = {**known, **versions()}
    return ", ".join(f"another {name} ({found[name]})" for name in known if found[name] != known[name])
