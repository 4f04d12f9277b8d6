"""The process below a SuperLink or a SuperNode that starts apps: without it nothing begins any more, and neither of the two says so."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

from fedsb.runtime.processes import ProcessTree, lives

NAME = "flower-superexec"
GRACE_S = 15.0


class Executor:
    """Watches for it.

    Args:
        tree: whose root starts it.
    """

    def __init__(self, tree: ProcessTree) -> None:
        self._tree = tree
        self._process: psutil.Process | None = None
        self._since = 0.0

    def gone(self) -> bool:
        """Tell whether it was there and has not been for a while: it ends a moment before a root that ends in order."""
        if self._process is not None:
            if lives(self._process):
                self._since = time.monotonic()
            return time.monotonic() > self._since + GRACE_S
        for process in self._tree.look():
            with suppress(psutil.NoSuchProcess):
                if any(NAME in word for word in process.cmdline()):
                    self._process, self._since = process, time.monotonic()
        return False
