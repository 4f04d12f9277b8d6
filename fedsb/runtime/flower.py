"""A private SuperLink with the runs on it: started, followed, judged and ended as one thing.

``flwr run`` by itself leaves a daemon behind that keeps the folder and the environment of its first caller, and returns 0 for a failed
run. :class:`LocalFlower` owns its SuperLink: state in a home of its own, a free port, every process ended by its id.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
_NOISE = re.compile(
    r"(DEBUG|INFO|WARNING) *:|Using SuperLink: |Successfully installed |\(\w+ pid=\d+\)"
    r"|.*FutureWarning: Tip: In future versions of Ray|  warnings\.warn\($"
)


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
        self._open: list[int] = []

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
        config = self.home / "run-config.toml"
        config.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n", encoding="utf-8")
        command = ["run", str(app), CONNECTION, "--run-config", str(config)]
        if self.simulation:
            command += ["--federation-config", f"num-supernodes={num_supernodes} client-resources-num-cpus={cpus_per_client}"]
        run_id = int(self._flwr(*command)["run-id"])
        self._open.append(run_id)
        return run_id

    def follow(self, run_id: int, write: Callable[[str], object] = print) -> None:
        """Pass on what the run prints until it ends, without Flower's and Ray's own chatter."""
        with self._log(run_id, subprocess.PIPE) as process:
            for line in own_lines(process.stdout or ()):
                write(line)

    def status(self, run_id: int) -> RunStatus:
        """Ask how the run stands."""
        run = self._flwr("list", CONNECTION, "--run-id", str(run_id))["runs"][0]
        return RunStatus(run["status"].rpartition(":")[2], run["status-details"])

    def wait(self, run_id: int, timeout: float = 600.0) -> RunStatus:
        """Wait for the end of the run.

        Raises:
            TimeoutError: it takes longer than ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        # Asking for the status costs a second of CPU each time; the log's end is free and comes with the run's.
        with self._log(run_id, subprocess.DEVNULL) as log, suppress(subprocess.TimeoutExpired):
            log.wait(timeout)
        while not (status := self.status(run_id)).finished:
            if time.monotonic() > deadline:
                raise TimeoutError(f"run {run_id} is still {status.state} after {timeout:.0f} s; see {self.log_file}")
            time.sleep(1.0)
        self._open.remove(run_id)
        return status

    def stop(self, run_id: int, timeout: float = 30.0) -> RunStatus:
        """Stop the run and wait until it is over."""
        # It may end by itself at this very moment, which Flower calls an error.
        with suppress(FlowerError):
            self._flwr("stop", str(run_id), CONNECTION)
        return self.wait(run_id, timeout)

    def close(self) -> None:
        """Stop what still runs, then end the SuperLink and everything below it."""
        if self._tree is None:
            return
        try:
            # Ray's helpers leave quickly when their run is stopped, and slowly when their grandparent disappears.
            for run_id in list(self._open) if self._tree.root.poll() is None else ():
                with suppress(FlowerError, TimeoutError):
                    self.stop(run_id)
        finally:
            self._tree.end()
            self._tree = None

    def _start(self) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        connection = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(connection, encoding="utf-8")
        command = [script("flower-superlink"), "--insecure", "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
        # State in memory: it ends with the block, and the migrations of a database file fail where flwr is installed below a path with
        # a space (it hands Alembic its folders joined by spaces).
        command += ["--simulation"] if self.simulation else []
        self._tree = ProcessTree(command, environment=self.environment, folder=self.folder, log=self.log_file)
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(f"http://{self.address}/health"):
            if self._tree.root.poll() is not None or time.monotonic() > deadline:
                raise FlowerError(f"the SuperLink did not start on {self.address}; the end of {self.log_file}:\n{tail(self.log_file)}")
            time.sleep(0.1)

    @contextmanager
    def _log(self, run_id: int, sink: int) -> Iterator[subprocess.Popen[str]]:
        """Stream the run's log into ``sink`` until the run or the block ends."""
        command = [script("flwr"), "log", str(run_id), CONNECTION, "--stream"]
        with subprocess.Popen(
            command, env=self.environment, cwd=self.home, text=True, stdout=sink, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return what it answers in JSON."""
        command = [script("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(command, env=self.environment, cwd=self.home, text=True, capture_output=True, check=False)
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            reply = {}
        if done.returncode or not reply.get("success"):
            said = reply.get("error-message") or (done.stderr or done.stdout).strip()
            raise FlowerError(f"'flwr {arguments[0]}' failed: {said}")
        return reply


def flower_environment(home: Path) -> dict[str, str]:
    """Return this process's environment, with a private home for Flower and its network calls switched off."""
    # Flower starts its helpers by name: they must come from the environment in which this runs, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **SWITCHES, "FLWR_HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}


def script(name: str) -> str:
    """Return the path of a console script beside this interpreter.

    Raises:
        FlowerError: it is not installed there.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise FlowerError(f"no '{name}' beside {sys.executable}; install flwr[simulation] into this environment")
    return str(path)


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines that are not log lines below ERROR of Flower or Ray, without colours and line ends."""
    for line in lines:
        plain = _ANSI.sub("", line.rstrip("\n"))
        if not _NOISE.match(plain):
            yield plain


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(path: Path, lines: int = 20) -> str:
    """Return the last lines of a text file."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1.0) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
