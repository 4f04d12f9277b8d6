"""A federation over Ray has the bits, the account and the failures of one in this process, whoever dies."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from fedsb import cli
from fedsb.commands import run as run_command
from fedsb.config.schema import Config
from fedsb.models.build import forget_models
from fedsb.privacy.account import DIAGNOSTICS, LEDGERS
from fedsb.run.folder import read_run
from fedsb.runtime.pool import pool_for, pools
from tests.runtime.pools import RAY, TRAINING, federate, processes, ready
from tests.strategies.private_runs import EXAMPLE, small

pytestmark = RAY
# A sample, for each takes up to half a minute: by what comes back to a worker, in evidence, residuals, ledgers and factors of its own.
RUNS = {
    "fed_sb": ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0"),
    "fedex_lora": ("method=fedex_lora", "federation.fraction=0.75"),
    # In secure sums: a worker that dies when it has masked is followed by one that masks by the same keys.
    "private examples": (*EXAMPLE, "init.kind=weight_svd", "federation.secure_sum=true", "federation.exactness=false"),
    # What a client keeps serves whichever worker it comes to next.
    "fedsa_lora": ("method=fedsa_lora", "federation.wire_dtype=int8"),
}
KILLS = {"fed_sb": (2,), "fedex_lora": (5,), "private examples": (2, 5), "fedsa_lora": (5,)}


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_are_those_of_one_process_whoever_dies(
    name: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, *RUNS[name])
    whole = federate(tmp_path / "whole", overrides)
    again = federate(tmp_path / "ray", overrides, KILLS[name])
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}
    assert charged(tmp_path / "ray") == charged(tmp_path / "whole")
    told, alone = ([record.client_metrics for record in read_run(tmp_path / name).records] for name in ("ray", "whole"))
    assert told == alone


def test_a_stack_has_the_bits_that_it_has_in_one_process(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd")
    whole = federate(tmp_path / "whole", overrides, stack=2)
    again = federate(tmp_path / "ray", overrides, (2,), stack=2)
    assert again["factors_sha256"] == whole["factors_sha256"]


def test_the_same_clients_fail_on_purpose(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "faults.crash=0.5", "federation.min_replies=1")
    whole, again = federate(tmp_path / "whole", overrides), federate(tmp_path / "ray", overrides, ())
    failed, other = ([record.failed for record in read_run(tmp_path / name).records] for name in ("whole", "ray"))
    assert failed == other
    assert len(failed) == 3
    assert 0 < sum(map(len, failed)) < 8
    assert all("(faults.crash)" in reason for record in failed for reason in record.values())
    assert again["factors_sha256"] == whole["factors_sha256"]


def charged(folder: Path) -> dict[str, list[str]]:
    """Return the lines of every ledger of a run, and what clients noted beside: twice, where one died between its note and its reply."""
    lines = {path: path.read_text().splitlines() for path in sorted((folder / LEDGERS).rglob("*.jsonl"))}
    return {
        str(path.relative_to(folder)): list(dict.fromkeys(found)) if path.name == DIAGNOSTICS else found for path, found in lines.items()
    }


def test_the_next_job_of_a_sweep_finds_actors_and_model_warm(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command itself, in this process: the same actors, and a base model that was laid down once."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_rounds=1", "runtime=ray", "runtime.workers=3")
    seen: list[tuple[list[int], list[ray.ObjectRef]]] = []
    run_job = run_command.run_job

    def noted(given: Config, overrides: list[str], output: Path) -> int:
        status = run_job(given, overrides, output)
        (pool,) = pools()
        seen.append((processes(pool), [ref for [ref] in pool.networks.values()]))
        return status

    monkeypatch.setattr(run_command, "run_job", noted)
    ready(pool_for(TRAINING)).networks.clear()
    forget_models()
    assert cli.run(["-m", *overrides, "runtime.cpus=0.5", "train.lr=0.01,0.02", f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    assert len(seen) == 2
    assert len(set(seen[0][0])) == 3
    assert len(seen[0][1]) == 1
    assert seen[0] == seen[1]
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2
