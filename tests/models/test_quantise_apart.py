"""What needs torchao or bitsandbytes, with them: in a process of its own, for all others would import torchao too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsb.models.quantise import KINDS

ROOT = Path(__file__).resolve().parents[2]
APART = Path(sys.prefix) / "quant"  # where `make setup` puts it
TESTS = (
    "tests/models/test_quantise.py",
    "tests/models/test_blocks4.py",
    "tests/models/test_eight_bit_moments.py",
    "tests/models/test_compiled_quantised.py",
    "tests/run/test_quantised_runs.py",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not APART.is_dir(), reason="torchao and bitsandbytes are not installed beside the environment; make setup does it")
def test_bases_and_moments_in_few_bits_where_their_packages_are_installed() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{APART}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(rf"(\d+) passed, {len(KINDS)} skipped", done.stdout)  # those of machines without the packages
    assert passed, done.stdout[-500:]
    assert int(passed[1]) >= 50
