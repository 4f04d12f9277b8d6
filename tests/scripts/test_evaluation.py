"""The measurement of a language model's evaluation runs, and evaluates what it says."""

from __future__ import annotations

import math
import re
import runpy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "evaluation.py"


def test_it_tells_loss_memory_and_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(BENCH), "2", "8"])
    runpy.run_path(str(BENCH), run_name="__main__")
    line = re.fullmatch(r"2 x 8 tokens: loss ([\d.]+), .* MiB at most \(all outputs are 3\), [\d.]+ s of CPU\n", capsys.readouterr().out)
    assert line
    assert abs(float(line[1]) - math.log(49_152)) < 0.3  # a model that knows nothing
