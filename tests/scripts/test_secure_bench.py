"""What a secure sum costs is measured from keys to the sum, which is held to be one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_bytes_and_seconds_are_held_against_their_bounds() -> None:
    asked = ["--clients", "4", "--modules", "60", "--rank", "8", "--turns", "1", "--frozen-mb", "1"]
    done = subprocess.run([sys.executable, ROOT / "scripts/bench/secure_sums.py", *asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "bytes of a client and round: 15,360 up and down without, 16,004 up and 16,496 down with" in done.stdout
    assert "server, 1 dropped out" in done.stdout
    assert done.stdout.count("PASS") == 3
