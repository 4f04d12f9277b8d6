"""A real federation on one machine: a SuperLink and two SuperNodes, each with the data of the client that it serves."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml

from fedsb.run.folder import read_run
from fedsb.runtime.flower import CONNECTION
from tests.flower.conftest import local
from tests.flower.harness import ROOT, belonging_to, deployment, eventually, submitting, summary

# Each message has a process of its own at a node, and what a client keeps lies on its disk.
OWN = ("method=fedsa_lora", "federation.num_rounds=2", "eval.every=2", "federation.wire_dtype=int8")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def node_file(data: Path, client: str) -> Path:
    """Write what the operator of one of the two says in a file: bounds that the run keeps, and a cache of its own."""
    path = data / f"{client}.yaml"
    said = {"client": client, "data": {"path": client}, "device": "cpu", "methods": ["fedsa_lora", "fed_sb"]}
    limits = {"max_local_epochs": 100, "max_seconds": 300}
    path.write_text(yaml.safe_dump({**said, "cache": {"folder": f"cache-{client}", "gb": 1}, "limits": limits}), encoding="utf-8")
    return path


def test_two_supernodes_end_with_the_factors_of_the_simulation_and_a_killed_run_is_told(base, overrides, tmp_path):
    """The killed one, whose clients nobody serves, is found out by Flower while another runs; of that the clients keep something."""
    data, output = tmp_path / "data", tmp_path / "kept" / "run"
    split = [sys.executable, str(ROOT / "scripts" / "split_data.py"), str(data), *overrides]
    subprocess.run(split, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    test_part = f"data.test_path={data / 'server' / 'test.jsonl'}"
    nodes = [{"file": str(node_file(data, "client-1"))}, {"client": "client-0", "data-path": str(data / "client-0")}]
    with deployment(tmp_path / "flower", nodes) as flower:

        def submitted(name: str, *more: str) -> AbstractContextManager[tuple[subprocess.Popen[str], Path]]:
            return submitting(CONNECTION, [*base, test_part, *more], environment=flower.environment, folder=tmp_path / name)

        with submitted("killed", "federation.names=[nobody,noone]", f"output={tmp_path / 'lost'}") as (lost, waiting):
            assert eventually(lambda: "waiting for nobody, noone" in waiting.read_text(), 200, pause=1.0), waiting.read_text()
            [server] = [process for process in flower.processes() if "flwr-serverapp" in " ".join(process.cmdline())]
            server.kill()
            with submitted("whole", f"output={output}", *OWN) as (whole, shown):
                simulated = local([*overrides, *OWN], tmp_path / "simulated")
                _, err = whole.communicate(timeout=400)
            assert (whole.returncode, err) == (0, "")
            _, err = lost.communicate(timeout=200)
        assert lost.returncode == 1
        assert re.fullmatch(rf"error: run \d+ failed: its ServerApp was killed, .*; go on with resume={tmp_path / 'lost'}\n", err)
    assert "round 2/2" in shown.read_text()
    assert summary(output)["factors_sha256"] == simulated["factors_sha256"]
    told, alone = ([record.client_metrics for record in read_run(tmp_path / kind / "run").records] for kind in ("kept", "simulated"))
    assert told == alone
    assert [len(metrics) for metrics in told] == [0, 0, 2]
    assert not [process for folder in (tmp_path / "flower").iterdir() for process in belonging_to(folder)]
