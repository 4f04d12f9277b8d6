"""What a private run of real nodes leaves behind tells no times, for a reply's time may tell of its data."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from fedsb.app.asked import config_of as client_config
from fedsb.client_app import app as client_app
from fedsb.server_app import serve
from tests.strategies.federations import ClientCall, KeepingGrid, named
from tests.strategies.private_runs import CLIENT, EXAMPLE, asked, run_privately, small, write_table


def three(folder: Path) -> tuple[dict[int, dict[str, Any]], tuple[str, ...]]:
    """Return three real nodes with data of their own, and the overrides that name them."""
    paths = {c: write_table(folder / f"{c}.csv", 25, lambda i, label, c=c: f"{c} {i}") for c in "abc"}  # type: ignore[misc]
    nodes = {n: named(client, **{"data-path": str(path)}) for n, (client, path) in enumerate(paths.items(), start=1)}
    return nodes, ("federation.num_clients=3", "federation.names=[a,b,c]", "federation.num_rounds=1")


def without(client: str) -> ClientCall:
    def call(message: Message, context: Context) -> Message:
        if asked(message)[0] == client:
            return Message(Error(2, "gone"), reply_to=message)
        return client_app(message, context)

    return call


@pytest.mark.parametrize("privacy", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_the_record_of_a_round_that_stopped_a_run_of_real_nodes_tells_as_little(
    privacy: tuple[str, ...], tiny_bert: Path, tmp_path: Path
) -> None:
    nodes, names = three(tmp_path)
    found = run_privately(small(tiny_bert, tmp_path, *names, *privacy), tmp_path / "run", nodes=nodes, app=without("c"))
    assert found.error is not None
    last = found.records[-1]
    assert (last.round, last.clients, set(last.failed)) == (1, ("a", "b"), {"c"})
    assert (last.wall_s, last.cpu_s, last.train_loss, last.simulation_only, last.accounts) == (None, None, None, {}, {})


@pytest.mark.parametrize(("privacy", "real"), [(EXAMPLE, True), (CLIENT, True), (EXAMPLE, False)])
def test_the_log_of_a_private_run_of_real_nodes_tells_no_times(
    privacy: tuple[str, ...], real: bool, tiny_bert: Path, tmp_path: Path
) -> None:
    nodes, names = three(tmp_path)
    overrides = small(tiny_bert, tmp_path, *(names if real else ("federation.num_rounds=1",)), *privacy, "log_level=debug", "progress=json")
    config = client_config(join(overrides), real=real)
    simulated: dict[int, dict[str, Any]] = {1: {"partition-id": 0, "num-partitions": 1}}
    serve(
        config,
        KeepingGrid(client_app, {"overrides": join(overrides), "output": str(tmp_path / "run")}, nodes if real else simulated),
        tmp_path / "run",
    )
    lines = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if " round 1" in line or " reply of " in line or " finished: " in line]
    assert sum(" round 1" in line for line in told) >= 2
    hidden = real and bool(privacy)
    assert {bool(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,", line)) for line in told} == {not hidden}
    assert any(" reply of " in line for line in told) is not hidden
    assert lines[0][:4].isdecimal()  # when it began is no secret
