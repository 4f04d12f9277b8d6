"""What needs torchao, with torchao: in a process of its own, for all others would import it too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
APART = Path(sys.prefix) / "quant"  # where `make setup` puts it
TESTS = ("tests/models/test_quantise.py", "tests/run/test_quantised_runs.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not APART.is_dir(), reason="torchao is not installed beside the environment; make setup does it")
def test_bases_in_few_bits_where_torchao_is_installed() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{APART}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed, 2 skipped", done.stdout)  # those of machines without it
    assert passed, done.stdout[-500:]
    assert int(passed[1]) >= 30
