"""What starts apps is missed where it has gone and its root has not noticed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsb.federation import executor
from fedsb.federation.executor import Executor
from fedsb.runtime.processes import ProcessTree
from tests.flower.harness import eventually

CHILD = [sys.executable, "-c", "import time; time.sleep(60)", executor.NAME]
PROGRAM = f"import subprocess, time; subprocess.Popen({CHILD!r}); time.sleep(60)"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[ProcessTree]:
    """A root that starts one."""
    made = ProcessTree([sys.executable, "-c", PROGRAM], environment={}, folder=tmp_path, log=tmp_path / "log")
    yield made
    made.end()


def children(tree: ProcessTree) -> list[psutil.Process]:
    return [process for process in tree.look() if executor.NAME in process.cmdline()]


def test_it_is_missed_after_a_while_and_not_before_it_was_there(tree: ProcessTree, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Executor(tree)
    assert not watch.gone()
    assert eventually(lambda: children(tree))
    assert not watch.gone()
    children(tree)[0].kill()
    assert eventually(lambda: not [each for each in tree.look() if each.status() != psutil.STATUS_ZOMBIE])
    assert not watch.gone()
    monkeypatch.setattr(executor, "GRACE_S", 0.0)
    assert eventually(watch.gone)
