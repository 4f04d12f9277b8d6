"""A private SuperLink with the runs on it: started, followed, judged and ended as one thing.

``flwr run`` by itself leaves a daemon behind that keeps the folder and the environment of its first caller, and returns 0 for a failed
run. :class:`LocalFlower` owns its SuperLink: state in a home of its own, a free port, every process ended by its id.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import psutil

from fedsb.runtime.processes import ProcessTree

CONNECTION = "private"
SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
_START_SECONDS = 60.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(r"(DEBUG|INFO|WARNING) *:|Successfully installed |\(\w+ pid=\d+\)|.*FutureWarning: Tip: In future versions of Ray")


class FlowerError(RuntimeError):
    """Flower could not be started, or refused a command."""


class RunStatus(NamedTuple):
    """How a run stands: ``state`` ends as ``completed``, ``failed`` or ``stopped``, and ``details`` says why."""

    state: str
    details: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.state in ("completed", "failed", "stopped")


class LocalFlower:
    """A SuperLink on the loopback interface, for the length of a ``with`` block.

    Args:
        home: folder for Flower's state (``FLWR_HOME``); made if need be.
        folder: working folder of the SuperLink, to which relative paths of a run refer; ``home`` if not given.
        simulation: simulate the SuperNodes with Ray; otherwise real ones connect to :attr:`address`.
        environment: variables on top of this process's own.
    """

    def __init__(self, home: Path, *, folder: Path | None = None, simulation: bool = True, environment: Mapping[str, str] | None = None):
        self.home = home.absolute()
        self.folder = (folder or home).absolute()
        self.simulation = simulation
        self.environment = flower_environment(self.home) | dict(environment or {})
        self.address = ""
        self._tree: ProcessTree | None = None
        self._runs: list[int] = []

    def __enter__(self) -> LocalFlower:
        self.home.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def log_file(self) -> Path:
        """What the SuperLink and everything below it wrote."""
        return self.home / "superlink.log"

    def processes(self) -> list[psutil.Process]:
        """Return the living processes below the SuperLink."""
        return self._tree.look() if self._tree else []

    def submit(self, app: Path, overrides: Sequence[str] = (), *, num_supernodes: int = 2, cpus_per_client: int = 1) -> int:
        """Submit an app folder and return the id of its run.

        Raises:
            FlowerError: Flower refused it; the message is Flower's own.
        """
        # A file, because Flower's parser of key=value pairs knows no escapes and paths may hold quotes.
        config = self.home / f"run-{len(self._runs)}.toml"
        config.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n", encoding="utf-8")
        command = ["run", str(app), CONNECTION, "--run-config", str(config)]
        if self.simulation:
            command += ["--federation-config", f"num-supernodes={num_supernodes} client-resources-num-cpus={cpus_per_client}"]
        run_id = int(self._flwr(*command)["run-id"])
        self._runs.append(run_id)
        return run_id

    def follow(self, run_id: int, write: Callable[[str], object] = print) -> None:
        """Pass on what the run prints until it ends, without Flower's and Ray's own chatter."""
        command = [_script("flwr"), "log", str(run_id), CONNECTION, "--stream"]
        with subprocess.Popen(
            command, env=self.environment, cwd=self.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            try:
                for line in own_lines(process.stdout or ()):
                    write(line)
            finally:
                process.terminate()

    def status(self, run_id: int) -> RunStatus:
        """Ask how the run stands."""
        self.processes()
        run = self._flwr("list", CONNECTION, "--run-id", str(run_id))["runs"][0]
        return RunStatus(run["status"].rpartition(":")[2], run["status-details"])

    def wait(self, run_id: int, timeout: float = 600.0) -> RunStatus:
        """Wait for the end of the run.

        Raises:
            TimeoutError: it takes longer than ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while not (status := self.status(run_id)).finished:
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run_id} is still {status.state} after {timeout:.0f} s; see {self.log_file}")
            time.sleep(0.5)
        self._runs = [run for run in self._runs if run != run_id]
        return status

    def stop(self, run_id: int) -> RunStatus:
        """Stop the run and wait until it has left."""
        if not self.status(run_id).finished:
            self._flwr("stop", str(run_id), CONNECTION)
        return self.wait(run_id)

    def close(self) -> None:
        """Stop what still runs, then end the SuperLink and everything below it."""
        tree, self._tree = self._tree, None
        if tree is not None:
            self._tree = tree if tree.root.poll() is None else None
            self._stop_all()
            self._tree = None
            tree.end()

    def _stop_all(self) -> None:
        for run_id in self._runs if self._tree else []:
            try:
                self.stop(run_id)
            except (FlowerError, TimeoutError) as error:
                print(f"run {run_id} could not be stopped: {error}", file=sys.stderr)
