"""Worker processes that run jobs side by side, job after job, so that imports, data and models are there for the next one.

They are forked from one process that has imported everything and has never computed: the fork of one that has may hang, or lose its GPU. A
worker that dies takes its job with it and no other; one whose parent has died ends at once, and leaves its job as a kill does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fedsb.core.signals import heeding_sigterm
from fedsb.core.streams import spell_out

CONTEXT = get_context("forkserver")
PRELOADED = "fedsb.commands.preloaded"  # by name, for it lies above
PATIENCE_S = 60.0  # for a job that was told to end, to write its checkpoint
LOOK_S = 1.0


@dataclass(frozen=True)
class Task:
    """What a worker does.

    Attributes:
        run: runs a job by its number, and returns its exit status.
        printed: the file of each job that takes what it prints.
        place: the folder that the worker stands in.
        environment: what it has of variables: those of the process that it is forked from may be older.
    """

    run: Callable[[int], int]
    printed: Mapping[int, Path]
    place: Path
    environment: Mapping[str, str]


@dataclass
class _Worker:
    process: BaseProcess
    line: Connection
    place: int
    job: int | None = None
    begun: float = 0.0


@dataclass(frozen=True)
class Event:
    """A job has begun (``status`` is None), or has ended; or, without a job, time has passed."""

    job: int | None = None
    status: int | None = None
    killed_by: str = ""
    wall_s: float = 0.0


def begin_early() -> None:
    """Let the process that workers are forked from begin to import, beside this one."""
    from multiprocessing import forkserver

    CONTEXT.set_forkserver_preload([PRELOADED])
    forkserver.ensure_running()


class Crew:
    """Workers for jobs; leave it through ``with``, which ends those that are there.

    Args:
        size: number of workers.
        task: what they do.
        cards: GPUs that they take in turn; 0 lets them be.
        cores: that each one has for what is not counted in threads.
    """

    def __init__(self, size: int, task: Task, *, cards: int = 0, cores: int = 1) -> None:
        CONTEXT.set_forkserver_preload([PRELOADED])
        self._task, self._size, self._cards, self._cores = task, size, cards, cores
        self._workers: list[_Worker] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            with suppress(OSError):
                worker.line.send(None)
            if worker.job is not None:
                worker.process.terminate()
        ends = time.monotonic() + PATIENCE_S
        for worker in self._workers:
            worker.process.join(max(0.0, ends - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.line.close()

    def run(self, jobs: Sequence[int]) -> Iterator[Event]:
        """Run jobs in their order, and yield what happens to them, at least once a second."""
        left = list(jobs)
        while left or any(worker.job is not None for worker in self._workers):
            while left and (worker := self._free()) is not None:
                worker.job, worker.begun = left[0], time.monotonic()
                try:
                    worker.line.send(worker.job)
                except OSError:  # died since its last job: another one takes this one
                    self._forget(worker)
                    continue
                yield Event(left.pop(0))
            yield from self._ended()

    def _free(self) -> _Worker | None:
        """Return a worker without a job, a new one where there may be more."""
        if (idle := next((worker for worker in self._workers if worker.job is None), None)) is not None:
            return idle
        if len(self._workers) == self._size:
            return None
        place = next(n for n in range(self._size) if n not in {worker.place for worker in self._workers})
        ours, theirs = CONTEXT.Pipe()
        card = place % self._cards if self._cards else None
        process = CONTEXT.Process(target=_serve, args=(theirs, self._task, card, self._cores))
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, place))
        return self._workers[-1]

    def _forget(self, worker: _Worker) -> None:
        worker.process.join()
        worker.line.close()
        self._workers.remove(worker)

    def _ended(self) -> Iterator[Event]:
        """Wait for news, a moment at most, and yield how jobs have ended."""
        lines = {worker.line: worker for worker in self._workers if worker.job is not None}
        for line in wait(list(lines), timeout=LOOK_S):
            worker = lines[line]  # type: ignore[index]
            job, wall_s, worker.job = worker.job, time.monotonic() - worker.begun, None
            try:
                yield Event(job, worker.line.recv(), wall_s=wall_s)
            except (EOFError, OSError):
                self._forget(worker)
                yield Event(job, *_death(worker.process.exitcode or 0), wall_s)
        yield Event()


def _death(code: int) -> tuple[int, str]:
    """Return the exit status of a process that has died, as a shell has it, and by what."""
    if code >= 0:
        return code or 1, f"its process ended with status {code}"
    hint = ", as a system does that is out of memory" if -code == signal.SIGKILL else ""
    return 128 - code, f"its process was ended by {signal.Signals(-code).name}{hint}"


def _serve(line: Connection, task: Task, card: int | None, cores: int) -> None:
    """In a worker: run the jobs that come along, and end with the process that hands them out."""
    threading.Thread(target=_follow, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes: the parent hands it on
    os.environ.update(task.environment)
    os.chdir(task.place)
    spell_out()
    if card is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = _card(card)
    import fedsb.app.threads as threads

    threads.CORES = cores
    with suppress(KeyboardInterrupt, EOFError), heeding_sigterm():
        while (job := line.recv()) is not None:
            print_to(task.printed[job])
            line.send(task.run(job))


def _card(number: int) -> str:
    """Return what a worker sees of the GPUs that its parent sees."""
    seen = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return seen[number] if number < len(seen) else str(number)


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGKILL)


def print_to(path: Path) -> None:
    """Send what is printed from now on into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
