"""The storm kills what it finds, and is not ended by what has gone before it looks."""

from __future__ import annotations

import argparse
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from scripts.storm import end, given

# Above the most that Linux gives.
NOBODY = 2**22 + 1


def test_a_run_that_has_gone_is_let_be() -> None:
    end(NOBODY)


def test_a_child_that_goes_while_it_looks_does_not_save_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as root, subprocess.Popen(["sleep", "60"]) as one, subprocess.Popen(["sleep", "60"]) as other:
        below = [psutil.Process(one.pid), psutil.Process(other.pid)]
        one.kill()
        one.wait()
        monkeypatch.setattr(psutil.Process, "children", lambda process, recursive: below)
        end(root.pid)
    assert (root.returncode, other.returncode) == (-signal.SIGKILL, -signal.SIGKILL)


def test_a_run_is_begun_with_the_overrides_and_resumed_with_its_folder_alone(tmp_path: Path) -> None:
    options = argparse.Namespace(runtime="ray", overrides=["privacy=example", "runtime.stack=3", "keep_checkpoints=1"])
    begun = given(tmp_path, options)
    assert {"federation.num_rounds=120", f"output={tmp_path}", "runtime=ray", *options.overrides} <= set(begun)
    (tmp_path / "config.yaml").touch()
    assert given(tmp_path, options) == [f"resume={tmp_path}"]
