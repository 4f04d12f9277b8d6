"""What the laws of named nodes share: when each is online, what it serves, and what it was told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedsb.client_app import app as client_app
from tests.strategies.federations import ClientCall, Federation, KeepingGrid, classification, federate, named

TWO = ("federation.num_clients=2", "federation.partition.sizes=null", "federation.partition.kind=iid", "train.local_steps=1")
REPLACE = "federation.replace_nodes=true"
ALWAYS = range(1, 9)


class Nodes(KeepingGrid):
    """Named nodes, each with the rounds in which it is online."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], nodes: Mapping[int, tuple[dict[str, Any], range]]) -> None:
        super().__init__(app, run_config, {node: config for node, (config, _) in nodes.items()})
        self._online = {node: rounds for node, (_, rounds) in nodes.items()}

    def get_node_ids(self) -> list[int]:
        coming = max(self.rounds(), default=0) + 1
        return [node for node, rounds in self._online.items() if coming in rounds]


def site(client: str, path: Path) -> dict[str, Any]:
    return named(client, **{"data-path": str(path)})


def run(bert: Path, table: Path, nodes: Mapping[int, tuple[dict[str, Any], range]], *more: str, app: ClientCall = client_app) -> Federation:
    overrides = [*classification(bert, table), *TWO, "init.kind=weight_svd", "federation.num_rounds=2", *more]
    return federate(overrides, grid=lambda a, c: Nodes(a, c, nodes), app=app)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the nodes have written to their logs."""
    return [record.getMessage() for record in caplog.records if record.name == "fedsb.app.answers"]
