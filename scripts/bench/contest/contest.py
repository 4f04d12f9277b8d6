"""Processes that do a round when told to, in turns, and what the whole tree of each has used."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from fedsb.core.logs import last_line

Key = TypeVar("Key", bound=Hashable)
SCRIPTS = Path(__file__).resolve().parents[1]
LOOK_S = 0.25  # between two looks at the memory


@dataclass(frozen=True)
class Rounds:
    """Seconds of the rounds that count, of the whole tree of processes."""

    cpu_s: list[float]
    wall_s: list[float]


@dataclass(frozen=True)
class Look:
    """What a contestant takes while no other one is there, which would share pages with it.

    Attributes:
        pss_mb: peak of the tree's proportional set size in a first round.
        startup_s: from its start until it can begin that round.
    """

    pss_mb: float
    startup_s: float


class Contestant:
    """Starts a command that says ``ready``, and ``done`` after each line that it is sent.

    Attributes:
        startup_s: how long that took.

    Raises:
        RuntimeError: it ended instead; with the last line that it said.
    """

    def __init__(self, command: Sequence[str]) -> None:
        # One module of ours serves the Flower apps in their own environment.
        path = f"{SCRIPTS.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        quiet = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        # Images for containers often set it, and then each process compiles what an environment did not when it was made.
        quiet |= {"PYTHONDONTWRITEBYTECODE": ""}
        begun = time.monotonic()
        self._command, self._said = command, tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **quiet},
            cwd=SCRIPTS,
        )
        self._rounds = Rounds([], [])
        try:
            self._hear("ready")
        except BaseException:
            self.close()
            raise
        self.startup_s = time.monotonic() - begun

    def look(self) -> Look:
        """Let it do a round that does not count, and look at its memory, which takes time also from those that are looked at."""
        over, peak = threading.Event(), 0.0

        def watch() -> None:
            nonlocal peak
            while not over.wait(LOOK_S):
                peak = max(peak, sum(pss_mb(process.pid) for process in tree(self._process.pid)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.warm_up()
        finally:
            over.set()
            watcher.join()
        return Look(peak, self.startup_s)

    def warm_up(self) -> None:
        """Let it do a round that does not count."""
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        self._hear("done")

    def round(self) -> None:
        """Let it do a round that counts."""
        cpu, wall = cpu_seconds(self._process.pid), time.monotonic()
        self.warm_up()
        self._rounds.wall_s.append(time.monotonic() - wall)
        self._rounds.cpu_s.append(cpu_seconds(self._process.pid) - cpu)

    def close(self) -> None:
        """End it and all below it."""
        below = [self._process, *psutil.Process(self._process.pid).children(recursive=True)] if self._process.poll() is None else []
        for process in below:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()
        self._process.wait()
        self._said.close()

    def measured(self) -> Rounds:
        """Return what the rounds that counted took."""
        return self._rounds

    def _hear(self, word: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == word:
                return
        self._said.seek(0)
        last = last_line(self._said.read().decode(errors="replace"))
        raise RuntimeError(f"a contestant ended before it said '{word}': {' '.join(self._command)}: {last}")


class Pair:
    """Two contestants of one kind who do each round at the same time: what a machine's cores take from each other."""

    def __init__(self, command: Sequence[str]) -> None:
        with ExitStack() as failed:
            first = failed.enter_context(closing(Contestant(command)))
            self._both = first, Contestant(command)
            failed.pop_all()

    def warm_up(self) -> None:
        """Let both do a round that does not count."""
        for contestant in self._both:
            contestant.warm_up()

    def round(self) -> None:
        """Let both do a round, from one moment on."""
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Contestant.round, self._both))

    def close(self) -> None:
        """End both."""
        for contestant in self._both:
            contestant.close()

    def measured(self) -> Rounds:
        """Return what both used, and how long the slower one took."""
        one, other = (contestant.measured() for contestant in self._both)
        return Rounds(
            [a + b for a, b in zip(one.cpu_s, other.cpu_s, strict=True)],
            [max(a, b) for a, b in zip(one.wall_s, other.wall_s, strict=True)],
        )


Start = Callable[[], Contestant]


def take_turns(starts: Mapping[Key, Callable[[], Contestant | Pair]], rounds: int, warm: int = 1) -> dict[Key, Rounds]:
    """Start all, and let each do its round before any does the next; ``warm`` rounds come before those that count."""
    with ExitStack() as open_ones:
        started = {key: open_ones.enter_context(closing(start())) for key, start in starts.items()}
        for _ in range(warm):
            for contestant in started.values():
                contestant.warm_up()
        for _ in range(rounds):
            for contestant in started.values():
                contestant.round()
    return {key: contestant.measured() for key, contestant in started.items()}


def look_at(start: Start) -> Look:
    """Start a contestant by itself, twice: what it reads from the disk, and compiles, is there the second time."""
    start().close()
    with closing(start()) as contestant:
        return contestant.look()


def tree(pid: int) -> list[psutil.Process]:
    """Return a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def cpu_seconds(pid: int) -> float:
    """Return what a tree of processes has used, those included that it has waited for."""
    total = 0.0
    for process in tree(pid):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def pss_mb(pid: int) -> float:
    """Return the proportional set size of a process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0
