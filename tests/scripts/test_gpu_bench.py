"""The benchmark for GPUs, dry: every part of it runs, on a CPU with tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_part_runs_dry(tmp_path: Path) -> None:
    table = tmp_path / "figures.json"
    command = [sys.executable, "scripts/bench/gpu.py", "--dry", "--json", str(table)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failed parts: none" in done.stdout
    said = " ".join(row["what"] for row in json.loads(table.read_text()))
    for part in ("over PEFT", "private step", "side by side", "round of 4 clients", "host waits"):
        assert part in said
