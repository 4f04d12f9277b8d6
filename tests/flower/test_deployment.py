"""A real federation on one machine: a SuperLink and two SuperNodes, each with the data of the client that it serves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.flower.harness import ROOT, belonging_to, deployment, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def test_two_supernodes_end_with_the_factors_of_the_simulation(app, base, overrides, expected, tmp_path):
    data, output = tmp_path / "data", tmp_path / "run"
    split = [sys.executable, str(ROOT / "scripts" / "split_data.py"), str(data), *overrides]
    subprocess.run(split, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    nodes = [{"client": client, "data-path": str(data / client)} for client in ("client-1", "client-0")]
    with deployment(tmp_path / "flower", nodes) as flower:
        run_id = flower.submit(app, [*base, f"data.test_path={data / 'server' / 'test.jsonl'}", f"output={output}"])
        status = flower.wait(run_id, 400)
        assert status.state == "completed", status.details
    assert summary(output)["factors_sha256"] == expected
    assert not [process for folder in (tmp_path / "flower").iterdir() for process in belonging_to(folder)]
