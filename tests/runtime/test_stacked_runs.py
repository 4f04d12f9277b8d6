"""Federations whose clients train side by side: the replies, ledgers and records of those that train one after the other."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import Context, Message

from clients import stacked
from fedsb import client_stack
from fedsb.adapters import SPECS
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.state import squared_norm, subtract
from fedsb.privacy.account import LEDGERS
from fedsb.privacy.ledger import Ledger
from fedsb.privacy.naming import client_folder
from fedsb.run.checkpoint import load_checkpoint
from fedsb.run.folder import read_run
from fedsb.run.resuming import resumed
from fedsb.runtime.grids import grid_for
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from tests.strategies.federations import FEDERATED_METHODS, in_rounds
from tests.strategies.private_runs import EXAMPLE, small

RUNS = {
    "fed_sb": ("init.kind=weight_svd", "federation.wire_dtype=bfloat16"),
    "fedavg_lora": ("method=fedavg_lora", "train.local_steps=null", "federation.wire_dtype=int8"),
    "fedex_lora": ("method=fedex_lora", "federation.fraction=0.75", "federation.num_rounds=3"),
    "head_only": ("method=head_only",),
    "private, adaptive": (*EXAMPLE, "init.kind=weight_svd", "privacy.clipping=adaptive", "federation.wire_dtype=int8"),
    "private clients": ("privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform", "init.kind=weight_svd"),
    "faults": ("init.kind=weight_svd", "faults.crash=0.2", "federation.min_replies=1"),
    "uneven": ("init.kind=weight_svd", "federation.partition.kind=size", "federation.partition.sizes=[1,2,3,4]", "train.local_steps=null"),
    "secure sums": ("init.kind=weight_svd", "federation.secure_sum=true", "federation.exactness=false"),
    "two ranks": ("method=flexlora", "federation.ranks=[1,1,2]"),
}
# What clients compute side by side follows from the adapter: its first method stands for the others. All weights have among them some of
# layers that keep no examples apart.
FIRST = {adapter: method for method in reversed(FEDERATED_METHODS) if (adapter := load([f"method={method}"]).method.adapter)}
RUNS |= {name: (f"method={name}", in_rounds(3)) for name in FIRST.values() if name not in RUNS}
PRIVATELY = [name for adapter, name in FIRST.items() if not SPECS[adapter].own and (SPECS[adapter].is_chain or not SPECS[adapter].factors)]
RUNS |= {f"private examples, {name}": (*EXAMPLE, f"method={name}") for name in PRIVATELY}


def federate(folder: Path, overrides: list[str], grid: type[LocalGrid] = LocalGrid) -> dict[str, Any]:
    config = load(overrides)
    made = grid_for(config, {"overrides": join(overrides), "output": str(folder)})
    assert type(made) is grid
    return serve(config, made, folder)


@pytest.mark.parametrize("name", RUNS)
def test_it_is_the_same_run(
    name: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    sizes: list[int] = []
    together = client_stack.answer_together
    monkeypatch.setattr(client_stack, "answer_together", lambda m, c: sizes.append(len(m)) or together(m, c))  # type: ignore[func-returns-value]
    overrides = small(tiny_bert, tmp_path, *RUNS[name])
    alone = federate(tmp_path / "alone", [*overrides, "runtime.stack=1"])
    assert not sizes
    with caplog.at_level(logging.WARNING):
        stacked = federate(tmp_path / "stacked", [*overrides, "runtime.stack=3"])
    assert 3 in sizes
    assert not [line for line in caplog.messages if "side by side" in line]
    for key in set(alone) - {"wall_s", "cpu_s", "factors_sha256", "exactness_gap"}:
        assert alike(stacked[key], alone[key]), key
    one, other = (load_checkpoint(tmp_path / run / "checkpoints").state for run in ("alone", "stacked"))
    assert squared_norm(subtract(one, other)) <= 1e-10 * squared_norm(one)
    for mine, theirs in zip(read_run(tmp_path / "stacked").records, read_run(tmp_path / "alone").records, strict=True):
        assert (mine.clients, mine.failed.keys(), mine.payload_up) == (theirs.clients, theirs.failed.keys(), theirs.payload_up)
        assert mine.epsilon == theirs.epsilon
    assert charges(tmp_path / "stacked") == charges(tmp_path / "alone")
    assert any(charges(tmp_path / "alone").values()) is name.startswith("private")


def alike(one: Any, other: Any) -> bool:
    """Tell whether two values of a summary are equal up to the last bits of a float."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(other, float) else other)


def charges(folder: Path) -> dict[str, list[str]]:
    """Return the charges by ledger, without the headers: those name the run, and the stack is a part of that."""
    return {str(path.relative_to(folder)): path.read_text().splitlines()[1:] for path in sorted((folder / LEDGERS).glob("*/ledger.jsonl"))}


def test_clients_that_cannot_be_computed_together_train_alone(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd")
    alone = federate(tmp_path / "alone", overrides)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("too many of them")

    monkeypatch.setattr("clients.stacked.taught_together", fail)
    with caplog.at_level(logging.WARNING):
        stacked = federate(tmp_path / "stacked", [*overrides, "runtime.stack=4"])
    assert stacked["factors_sha256"] == alone["factors_sha256"]
    assert "clients side by side failed, each trains alone now: too many of them" in caplog.messages


@pytest.mark.parametrize(("name", "kept"), [("private examples, fedavg_lora", 5), ("private, adaptive", 4)])
def test_a_private_stack_ended_between_two_of_its_replies_releases_nothing_new(
    name: str, kept: int, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clients answer one after the other: the replies of some are kept when it ends, and the others train again in the same company."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    company: list[int] = []
    taught = stacked.taught_together
    monkeypatch.setattr(
        stacked, "taught_together", lambda stack, task, lessons, **how: company.append(len(lessons)) or taught(stack, task, lessons, **how)
    )  # type: ignore[func-returns-value]
    overrides = small(tiny_bert, tmp_path, *RUNS[name], "runtime.stack=3", "federation.num_clients=3")
    whole = federate(tmp_path / "whole", overrides)
    keep, left = Ledger.keep, iter(range(kept))

    def ended(*given: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        keep(*given)

    folder = tmp_path / "ended"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "keep", ended)
        with pytest.raises(KeyboardInterrupt):
            federate(folder, overrides)
    rounds = len(company)
    again = [f"resume={folder}"]
    config = resumed(load(again), again)
    summary = serve(config, grid_for(config, {"overrides": join(again), "output": str(folder)}), folder)
    assert summary["factors_sha256"] == whole["factors_sha256"]
    assert charges(folder) == charges(tmp_path / "whole")
    assert len(company) > rounds
    assert set(company) == {3}


def test_a_stack_of_one_is_the_client_itself(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cohort that does not divide evenly leaves one alone, to the bit."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_clients=1", rows=20)
    grid = LocalGrid.simulation(app, {"overrides": join(overrides)}, stack=4, together=client_stack.answer_together)
    stacked = serve(load(overrides), grid, tmp_path / "stacked")
    assert stacked["factors_sha256"] == federate(tmp_path / "alone", overrides)["factors_sha256"]


def test_a_ledger_that_cannot_be_read_puts_its_own_client_out(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The others train together, as they would without it."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    sizes: list[int] = []
    beside = client_stack._side_by_side
    monkeypatch.setattr(client_stack, "_side_by_side", lambda seats: sizes.append(len(seats)) or beside(seats))  # type: ignore[func-returns-value]
    overrides = small(tiny_bert, tmp_path, *EXAMPLE, "init.kind=orthogonal", "federation.num_rounds=1", "federation.min_replies=1")
    seats: list[Message] = []

    def together(messages: list[Message], contexts: list[Context]) -> list[Message]:
        broken = tmp_path / "run" / LEDGERS / client_folder("client-1") / "ledger.jsonl"
        broken.parent.mkdir(parents=True, exist_ok=True)
        broken.write_text("no ledger\n")
        seats.extend(client_stack.answer_together(messages, contexts))
        return seats[-len(messages) :]

    grid = LocalGrid.simulation(app, {"overrides": join(overrides), "output": str(tmp_path / "run")}, stack=3, together=together)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match="no header of a privacy ledger"):  # the server's own reading
        serve(load(overrides), grid, tmp_path / "run")
    assert sizes == [2]  # of four: a stack of three, from which one is missing, and one alone
    assert not [line for line in caplog.messages if "side by side" in line]
    assert [sorted(reply.content.array_records) for reply in seats].count(["arrays"]) == 2


@pytest.mark.parametrize("ranks", ["[1,2]", "[1,1,2]", "[1,2,2,2]"])
def test_how_many_of_one_rank_go_together_is_told(
    ranks: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    sizes: list[int] = []
    beside = client_stack._side_by_side
    monkeypatch.setattr(client_stack, "_side_by_side", lambda seats: sizes.append(len(seats)) or beside(seats))  # type: ignore[func-returns-value]
    sized = ("federation.partition.kind=size", "federation.partition.sizes=[1,2,3,4,5]", "federation.num_clients=5", "rank=2")
    more = ("method=flexlora", f"federation.ranks={ranks}", "federation.fraction=0.8", "runtime.stack=3", "train.local_steps=1", *sized)
    federate(tmp_path / "run", small(tiny_bert, tmp_path, *more))
    trained = sum(len(record.clients) for record in read_run(tmp_path / "run").records)
    passes = len(sizes) + trained - sum(sizes)
    said = f"federation.ranks: only clients of one rank train side by side, {trained / passes:.1f} on average over the run"
    assert said in capsys.readouterr().out.splitlines()
