"""What a round costs a server is measured of every method of which it holds a whole model, beside a dense SVD."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategies.rounds import METHODS, WHOLE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_method_is_measured() -> None:
    asked = ["--size", "32", "--rank", "4", "--clients", "3", "--turns", "1"]
    done = subprocess.run([sys.executable, ROOT / "scripts/bench/server.py", *asked], cwd=ROOT, capture_output=True, text=True)
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == ["a dense SVD", *(name for name in METHODS if name in WHOLE)], done.stderr[-2000:]
    assert "a dense SVD over flexlora" in done.stdout
