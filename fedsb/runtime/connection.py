"""Runs on a SuperLink, through Flower's own command line: submitted, followed to their end, and judged.

``flwr run`` returns 0 however a run ends. A :class:`Connection` tells how it did.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

SWITCHES = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
OUTAGE_S = 60.0  # for which a SuperLink may be away while a run is followed
QUIET_S = 300.0  # after which it is asked, while a log is followed, whether the run and the SuperLink are still there
_PAUSE_S = 1.0
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_NOISE = re.compile(
    r"(DEBUG|INFO|WARNING) *:|Using SuperLink: |Successfully installed |\(\w+ pid=\d+\)"
    r"|\W*Displaying information for run ID|.*FutureWarning: Tip: In future versions of Ray|  warnings\.warn\($"
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


class Connection:
    """A connection of Flower's configuration, and the runs that go over it.

    Args:
        name: of the connection.
        environment: of Flower's commands; says where its configuration lies.
        folder: in which they run; a SuperLink that they start stays there.
        patience: seconds for which the SuperLink may not answer while a run is followed.
    """

    def __init__(self, name: str, *, environment: dict[str, str], folder: Path, patience: float = OUTAGE_S) -> None:
        self.name = name
        self.environment = environment
        self.folder = folder
        self._patience = patience
        self._open: set[int] = set()  # runs that were submitted here and whose end was not seen

    def submit(self, app: Path, overrides: Sequence[str] = (), *, options: Sequence[str] = ()) -> int:
        """Submit an app folder and return the id of its run.

        Args:
            app: the folder.
            overrides: Hydra's.
            options: of ``flwr run``.

        Raises:
            FlowerError: Flower refused it; the message is Flower's own, in one line.
        """
        with tempfile.TemporaryDirectory(prefix="fedsb-") as folder:
            # A file, because Flower's parser of key=value pairs knows no escapes and paths may hold quotes.
            config = Path(folder) / "run-config.toml"
            config.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n", encoding="utf-8")
            run_id = int(self.flwr("run", str(app), self.name, "--run-config", str(config), *options)["run-id"])
        self._open.add(run_id)
        return run_id

    def follow(self, run_id: int, write: Callable[[str], object] = print) -> RunStatus:
        """Pass on what the run prints until it ends, without Flower's and Ray's own chatter, and return how it ended.

        Raises:
            FlowerError: the SuperLink does not answer any more; how the run stands is not known.
        """
        seen, last = 0, time.monotonic()
        while True:
            seen = self._pass_on(run_id, write, seen)
            try:
                status = self.status(run_id)
            except FlowerError:
                if time.monotonic() > last + self._patience:
                    raise
            else:
                if status.finished:
                    return status
                last = time.monotonic()
            time.sleep(_PAUSE_S)

    def status(self, run_id: int) -> RunStatus:
        """Ask how the run stands."""
        run = self.flwr("list", self.name, "--run-id", str(run_id))["runs"][0]
        details = run["status-details"]
        status = RunStatus(run["status"].rpartition(":")[2], "" if details == "N/A" else details)
        if status.finished:
            self._open.discard(run_id)
        return status

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
                raise TimeoutError(f"run {run_id} is still {status.state} after {timeout:.0f} s")
            time.sleep(_PAUSE_S)
        return status

    def stop(self, run_id: int, timeout: float = 30.0) -> RunStatus:
        """Stop the run and wait until it is over."""
        # It may end by itself at this very moment, which Flower calls an error.
        with suppress(FlowerError):
            self.flwr("stop", str(run_id), self.name)
        return self.wait(run_id, timeout)

    def _pass_on(self, run_id: int, write: Callable[[str], object], seen: int) -> int:
        """Pass on the log but for its first ``seen`` lines, until it ends or the connection does; return how many lines there were."""
        with self._log(run_id, subprocess.PIPE) as process, self._doubting(run_id, process):
            count = 0

            def counted() -> Iterator[str]:
                nonlocal count
                for line in process.stdout or ():
                    count += 1
                    yield line

            for line in own_lines(islice(counted(), seen, None)):
                write(line)
        return max(count, seen)

    @contextmanager
    def _doubting(self, run_id: int, log: subprocess.Popen[str]) -> Iterator[None]:
        """End a log that would never end by itself: where the SuperLink's machine or the network went down, no byte says so."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(QUIET_S):
                try:
                    going_on = not self.status(run_id).finished
                except FlowerError:
                    going_on = False
                # The last lines of a run that has just ended are on their way.
                if not going_on and not over.wait(10 * _PAUSE_S):
                    log.terminate()

        threading.Thread(target=look, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    @contextmanager
    def _log(self, run_id: int, sink: int) -> Iterator[subprocess.Popen[str]]:
        """Stream the run's log into ``sink`` until the run or the block ends."""
        command = [script("flwr"), "log", str(run_id), self.name, "--stream"]
        with subprocess.Popen(
            command, env=self.environment, cwd=self.folder, text=True, stdout=sink, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command and return what it answers in JSON.

        Raises:
            FlowerError: it failed; the message is Flower's own, in one line.
        """
        command = [script("flwr"), *arguments, "--format", "json"]
        done = subprocess.run(command, env=self.environment, cwd=self.folder, text=True, capture_output=True, check=False)
        try:
            reply: dict[str, Any] = json.loads(done.stdout)
        except json.JSONDecodeError:
            reply = {}
        if done.returncode or not reply.get("success"):
            said = reply.get("error-message") or done.stderr or done.stdout
            raise FlowerError(f"'flwr {arguments[0]}' failed: {' '.join(' '.join(own_lines(said.splitlines())).split())}")
        return reply


def flower_environment(home: Path | None = None) -> dict[str, str]:
    """Return this process's environment with Flower's network calls switched off, and a home of its own for it if one is given."""
    own = {} if home is None else {"FLWR_HOME": str(home)}
    # Flower starts its helpers by name: they must come from the environment in which this runs, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **SWITCHES, **own, "PATH": path, "PYTHONUNBUFFERED": "1"}


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
