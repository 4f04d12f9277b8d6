"""A private SuperLink with the runs on it: started, followed, judged and ended as one thing.

``flwr run`` by itself leaves a daemon behind that keeps the folder and the environment of its first caller. :class:`LocalFlower` owns its
SuperLink: state in a home of its own, a free port, every process ended by its id.
"""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from fedsb.runtime.connection import Connection, FlowerError, flower_environment, script
from fedsb.runtime.processes import ProcessTree

CONNECTION = "private"
_START_SECONDS = 60.0


class LocalFlower(Connection):
    """A connection to a SuperLink of its own on the loopback interface, for the length of a ``with`` block.

    Args:
        home: folder for Flower's state (``FLWR_HOME``); made if need be.
        folder: working folder of the SuperLink, to which relative paths of a run refer; ``home`` if not given.
        simulation: simulate the SuperNodes with Ray; otherwise real ones connect to :attr:`address`.
        environment: variables on top of this process's own.
    """

    def __init__(self, home: Path, *, folder: Path | None = None, simulation: bool = True, environment: Mapping[str, str] | None = None):
        self.home = home.absolute()
        super().__init__(CONNECTION, environment=flower_environment(self.home) | dict(environment or {}), folder=self.home, patience=0.0)
        self._launch_folder = (folder or home).absolute()
        self.simulation = simulation
        self.address = ""
        self._tree: ProcessTree | None = None

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

    def submit(
        self, app: Path, overrides: Sequence[str] = (), *, options: Sequence[str] = (), num_supernodes: int = 2, cpus_per_client: int = 1
    ) -> int:
        """Submit an app folder and return the id of its run; the numbers are those of a simulation.

        Raises:
            FlowerError: Flower refused it; the message is Flower's own.
        """
        numbers = f"num-supernodes={num_supernodes} client-resources-num-cpus={cpus_per_client}"
        return super().submit(app, overrides, options=[*options, *(["--federation-config", numbers] if self.simulation else [])])

    def close(self) -> None:
        """Stop what still runs, then end the SuperLink and everything below it."""
        if self._tree is None:
            return
        try:
            # Ray's helpers leave quickly when their run is stopped, and slowly when their grandparent disappears.
            for run_id in sorted(self._open) if self._tree.root.poll() is None else ():
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
        self._tree = ProcessTree(command, environment=self.environment, folder=self._launch_folder, log=self.log_file)
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(f"http://{self.address}/health"):
            if self._tree.root.poll() is not None or time.monotonic() > deadline:
                raise FlowerError(f"the SuperLink did not start on {self.address}; the end of {self.log_file}:\n{tail(self.log_file)}")
            time.sleep(0.1)


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
