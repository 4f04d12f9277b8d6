"""A run that is taken up again goes on with the account it had, and with no other one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import PRVAccountant

from fedsb.core.errors import UserError
from fedsb.privacy.randomness import simulated_streams
from fedsb.run.folder import read_run
from tests.run.mortal import RUNS, Killed, Run

PRIVATE_START = ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0", "privacy.init_fraction=0.3")


def test_epsilon_is_that_of_the_ledgers_with_empty_samples_and_absent_rounds(run: Run, tmp_path: Path) -> None:
    """Killed twice, half of the clients a round, one example a sample on average: Opacus alone, from the files, says the same."""
    more = ("privacy=example", "privacy.epsilon=8", "privacy.accountant=prv", "init.kind=weight_svd")
    sparse = (*more, "federation.fraction=0.5", "train.batch_size=1")
    folder = tmp_path / "run"
    for given, life in (((*sparse,), 4), ((f"resume={folder}",), 1)):
        with pytest.raises(Killed):
            run(folder, *given, life=life, after=True)
    summary = run(folder, f"resume={folder}")
    found, empty = {}, 0
    for path in (folder / "ledgers").glob("*/ledger.jsonl"):
        header, *charges = [json.loads(line) for line in path.read_text().splitlines()]
        accountant = PRVAccountant()
        for charge in charges:
            [entry] = charge["entries"]
            accountant.history += [(entry["noise_multiplier"], entry["sampling_rate"], entry["steps"])]
            draws = simulated_streams(0, header["client"], charge["key"][1], "train", torch.device("cpu")).sampling
            empty += sum(not bool((torch.rand(20, generator=draws) < entry["sampling_rate"]).any()) for _ in range(entry["steps"]))
        found[header["client"]] = accountant.get_epsilon(delta=1e-5)
        assert len(charges) == sum(header["client"] in record.clients for record in read_run(folder).records[1:])
    assert empty > 0
    assert len(set(map(len, [[r for r in read_run(folder).records[1:] if c in r.clients] for c in found]))) > 1
    assert summary["epsilon"]["max"] == pytest.approx(max(found.values()), rel=0.01)
    assert 0.95 * 8 <= summary["epsilon"]["max"] <= 8


HEADERS: dict[str, dict[str, Any] | None] = {
    "another run": {"run": "0123456789abcdef"},
    "another privacy": {"privacy": {}},
    "no header": None,
}
EARLY, LATE = 3, 12  # before the first checkpoint, and after it


# All pairs of a unit, a header and a time.
@pytest.mark.parametrize(
    ("kind", "header", "life"),
    [
        ("private examples", "another run", EARLY),
        ("private examples", "another privacy", LATE),
        ("private examples", "no header", EARLY),
        ("private clients", "another run", LATE),
        ("private clients", "another privacy", EARLY),
        ("private clients", "no header", LATE),
    ],
)
def test_a_ledger_of_another_configuration_is_refused_before_anyone_is_asked(
    kind: str, header: str, life: int, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(folder, *RUNS[kind], *PRIVATE_START, life=life)
    ledger = next(folder.glob("ledgers/*/ledger.jsonl"))
    first, *rest = ledger.read_text().splitlines(keepends=True)
    other = HEADERS[header]
    foreign = "[]" if other is None else json.dumps({**json.loads(first), **other})
    ledger.write_text("".join([f"{foreign}\n", *rest]))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ledger.name}
    with pytest.raises(UserError, match=r"ledger.jsonl' was kept for another configuration|line 1 is no header of a privacy ledger"):
        run(folder, f"resume={folder}")
    assert all(path.read_bytes() == content for path, content in before.items())
    ledger.write_text("".join([first, *rest]))
    assert run(folder, f"resume={folder}")["epsilon"]["max"] > 0


def test_a_folder_that_was_renamed_is_not_charged_again_for_the_same_noise(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", *RUNS["private clients"])
    with pytest.raises(Killed):
        run(tmp_path / "killed", *RUNS["private clients"], life=10)
    folder = (tmp_path / "killed").rename(tmp_path / "renamed")
    again = run(folder, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert again["epsilon"] == whole["epsilon"]
    ledgers = [(tmp_path / name / "ledgers" / "server" / "ledger.jsonl").read_text() for name in ("renamed", "whole")]
    assert ledgers[0] == ledgers[1]
