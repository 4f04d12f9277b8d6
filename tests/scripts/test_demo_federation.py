"""The demonstration of a real federation: three nodes over TLS, each with a key and a worker, two rounds, and nothing left of it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from scripts.demo_federation import DEFAULTS, FAILED, left_running, main
from tests.flower.conftest import local
from tests.flower.harness import ROOT, summary


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_three_nodes_end_with_the_factors_of_a_simulation_and_all_is_stopped(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_FOLDER", str(tmp_path / "demo"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = ["experiment=quick", "model=pretrained", f"model.name={tiny_bert}", "rank=4", "eval.max_examples=20"]
    assert main(asked) == os.EX_OK
    out, _ = capfd.readouterr()
    assert out.splitlines()[-1] == "all is stopped; nothing is left running"
    assert not left_running(tmp_path)
    assert "limits of operators: held by a worker at client-0, client-1, client-2" in out
    assert [line for line in out.splitlines() if line.startswith("node client-")] == [f"node client-{i}: online" for i in range(3)]
    simulated = local([*DEFAULTS, *asked], tmp_path / "simulated")
    assert summary(tmp_path / "demo" / "run")["factors_sha256"] == simulated["factors_sha256"]


@pytest.mark.slow
def test_each_command_is_shown_as_it_was_given_and_a_failed_one_leaves_nothing_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEMO_FOLDER", str(tmp_path / "a demo"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["federation.num_clients=nobody"]) == FAILED
    out, err = capfd.readouterr()
    [shown, last] = out.splitlines()
    data = str(tmp_path / "a demo" / "data")
    assert shlex.split(shown) == ["$", "python", "scripts/split_data.py", data, *DEFAULTS, "federation.num_clients=nobody"]
    assert last == "all is stopped; nothing is left running"
    assert err.splitlines()[-1] == f"error: '{shown.removeprefix('$ ')}' ended with status 2"
