"""A child process and everything below it, ended by process id."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_LOOK_SECONDS = 1.0
# Not as preexec_fn, which runs Python between fork and exec beside other threads. PR_SET_PDEATHSIG is 1 in linux/prctl.h; whoever has lost
# its parent before that call is told by the number.
_FOLLOW = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])"
)


def following(command: Sequence[str]) -> list[str]:
    """Return the command that ends by SIGTERM when this process is gone, however it went (Linux; elsewhere the command as it is)."""
    return [sys.executable, "-I", "-c", _FOLLOW, str(os.getpid()), *command] if sys.platform == "linux" else list(command)


class ProcessTree:
    """A command, and the processes that it starts in turn.

    Descendants are remembered while their parents live: one whose parent has gone can't be found from the root any more, and Ray's agents
    outlive the run that started them by some seconds.
    The root gets a session of its own, so that Ctrl-C in a terminal reaches the owner of the tree first.
    """

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path):
        with log.open("ab") as sink:
            self.root = subprocess.Popen(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        self._known: set[psutil.Process] = set()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._watch = threading.Thread(target=self._keep_looking, daemon=True)
        self._watch.start()

    def look(self) -> list[psutil.Process]:
        """Remember the processes there are now below the root and return the living ones."""
        with self._lock:
            for parent in [*self._roots(), *self._known]:
                try:
                    self._known.update(parent.children(recursive=True))
                except psutil.NoSuchProcess:
                    continue
            self._known = {process for process in self._known if lives(process)}
            return list(self._known)

    def end(self, patience: float = 20.0) -> None:
        """End the root, wait for the rest to follow by itself, and end what does not."""
        self._ending.set()
        self._watch.join()
        self.look()
        self.root.terminate()
        try:
            self.root.wait(patience)
        except subprocess.TimeoutExpired:
            self.root.kill()
            self.root.wait()
        _, alive = psutil.wait_procs(self.look(), timeout=patience / 2)
        for signal in ("terminate", "kill"):
            for process in alive:
                _send(process, signal)
            _, alive = psutil.wait_procs(alive, timeout=patience / 4)

    def _roots(self) -> list[psutil.Process]:
        try:
            return [psutil.Process(self.root.pid)]
        except psutil.NoSuchProcess:
            return []

    def _keep_looking(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            self.look()


def lives(process: psutil.Process) -> bool:
    """Tell whether a process has not ended; one that nobody has asked how it ended has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, signal: str) -> None:
    try:
        getattr(process, signal)()
    except psutil.NoSuchProcess:
        return
