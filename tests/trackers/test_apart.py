"""The real trackers, in a process of its own: their packages are no business of other tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APART = Path(sys.prefix) / "trackers"  # where `make setup` puts them


@pytest.mark.slow
@pytest.mark.skipif(not APART.is_dir(), reason="tensorboard, mlflow and wandb are not installed beside the environment; make setup does it")
def test_what_trackers_write_where_they_are_installed() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trackers/test_written.py"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{APART}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^14 passed", done.stdout, re.MULTILINE), done.stdout[-500:]
