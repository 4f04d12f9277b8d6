"""Real nodes, which do not see a run's folder, go on with its configuration or are refused, and train with no other."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import join
from socket import gethostname
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedsb import client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.privacy.codes import CODES
from fedsb.run.resuming import resumed
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from tests.run.mortal import Killed, Mortal
from tests.strategies.federations import named
from tests.strategies.private_runs import EXAMPLE, small, write_table


def on_nodes(folder: Path, tiny_bert: Path, tmp_path: Path, *given: str, life: int = 10**9, own: bool = True) -> dict[str, Any]:
    """Run on two real nodes, which a resumed run finds no folder on."""
    nodes = {}
    for number, client in enumerate(("client-0", "client-1"), start=1):
        if not (path := tmp_path / f"{client}.csv").exists():
            write_table(path, 20)
        nodes[number] = named(client, **{"data-path": str(path)})
    overrides = list(given) or small(tiny_bert, tmp_path, *ON_NODES)
    config = resumed(load(overrides), overrides)
    seen = [override if not override.startswith("resume=") else f"resume={tmp_path / 'nowhere'}" for override in overrides]
    grid = Mortal(client_app.app, {"overrides": join(seen)}, nodes)
    grid.life = life
    return serve(config, grid, folder, overrides=overrides if own else None)


ON_NODES = ("method=fedex_lora", "federation.num_clients=2", "federation.num_rounds=3", "train.lr=0.01")


def test_real_nodes_go_on_with_what_the_run_was_begun_with(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    whole = on_nodes(tmp_path / "whole", tiny_bert, tmp_path)
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, life=6)
    again = on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}")
    assert again["factors_sha256"] == whole["factors_sha256"]
    assert again["failures"] == 0


def test_real_nodes_are_refused_where_nobody_knows_their_configuration(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        on_nodes(folder, tiny_bert, tmp_path, life=6, own=False)
    with pytest.raises(UserError, match=r"^resume on real nodes, which don't see the run's folder: .*give its own overrides too$"):
        on_nodes(folder, tiny_bert, tmp_path, f"resume={folder}")
    assert on_nodes(folder, tiny_bert, tmp_path, *small(tiny_bert, tmp_path, *ON_NODES), f"resume={folder}")["failures"] == 0


@pytest.mark.parametrize("given", [("resume=gone",), (*EXAMPLE, "resume=gone")], ids=["plain", "private"])
def test_a_machine_without_the_folder_trains_with_no_other_configuration(given: tuple[str, ...], tiny_bert: Path, tmp_path: Path) -> None:
    overrides = join(small(tiny_bert, tmp_path, *given))
    nodes: dict[int, dict[str, Any]] = {1: {"partition-id": 0, "num-partitions": 1}, 2: {"client": "client-1", "data-path": str(tmp_path)}}
    asked = RecordDict({"config": ConfigRecord({"clients": '["client-0"]', "labels": '["film", "sport", "trade"]'})})
    grid = LocalGrid(client_app.app, {"overrides": overrides}, nodes)
    simulated, real = grid.send_and_receive([Message(asked, node, "query.describe") for node in nodes])
    assert re.search(
        rf"UserError: resume=.*gone: that folder is not there on {re.escape(gethostname())}; share it", str(simulated.error.reason)
    )
    assert real.content.metric_records["metrics"]["code"] == CODES["refused"].number
