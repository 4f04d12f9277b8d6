"""Hydra's submitit launcher, by its local executor: a process a job, which the launcher asks for and which outlives it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.commands.calls import Call
from tests.commands.test_side_by_side import held_by, start, wait_for, workers
from tests.commands.test_sweep import bits, manifest, states

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec("submitit"), reason="submitit is missing: `make setup` installs it")]
LAUNCHER = "hydra/launcher=submitit_local"


def test_a_job_that_dies_leaves_the_others_and_the_sweep_goes_on(call: Call, quick: list[str], tmp_path: Path) -> None:
    """The launcher gives up at the first job that dies; what it has begun is waited for, and told of as it stands."""
    grid = (*quick, "method=head_only", "federation.num_rounds=1,60", "seed=0,1")
    folder, victim, name = tmp_path / "sweep", [], "num_rounds=60+seed=0"
    sweep = start(tmp_path, "run", "-m", *grid, LAUNCHER, "output=sweep")
    wait_for(lambda: (folder / name / "metrics.jsonl").is_file(), sweep)
    wait_for(lambda: victim.extend(held_by(workers(sweep), folder / name)) or victim, sweep)
    assert states(folder)[name] == "running"
    victim[0].kill()
    out, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 1, err
    assert "Traceback" not in err
    rows = {row["name"]: row for row in manifest(folder)["jobs"]}
    assert {key: row["state"] for key, row in rows.items() if key != name} == dict.fromkeys(rows.keys() - {name}, "finished")
    assert (rows[name]["state"], rows[name]["status"]) == ("failed", 1)
    assert rows[name]["reason"].startswith("its process died (the launcher said: UncompletedJobError")
    assert json.loads(out.splitlines()[-1])["jobs"][2]["note"] == rows[name]["reason"]
    sweep = start(tmp_path, "run", "-m", "resume=sweep", LAUNCHER)
    _, err = sweep.communicate(timeout=280)
    assert sweep.returncode == 0, err
    assert call("run", "-m", *grid, "output=whole")[0] == 0
    assert bits(folder) == bits(tmp_path / "whole")
