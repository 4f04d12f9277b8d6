"""What a process has started ends when it does, in order or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedsb.runtime.processes import ProcessTree, following
from tests.flower.harness import ROOT, eventually

OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fedsb.runtime.processes import ProcessTree, following
here = Path(sys.argv[2])
tree = ProcessTree(following([sys.executable, "-c", "import time; time.sleep(60)"]), environment={}, folder=here, log=here / "log")
print(tree.root.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a signal of Linux")
def test_it_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(ROOT), str(tmp_path)], text=True, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child = psutil.Process(int(owner.stdout.readline()))
        assert eventually(lambda: "time.sleep(60)" in " ".join(child.cmdline()))  # by now, and nothing on the way
        owner.kill()
    assert eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_it_is_the_command_itself_and_ends_by_its_own_status(tmp_path: Path) -> None:
    command = following([sys.executable, "-c", "import sys; sys.exit(7)"])
    tree = ProcessTree(command, environment={}, folder=tmp_path, log=tmp_path / "log")
    assert tree.root.wait(20) == 7
    tree.end()
