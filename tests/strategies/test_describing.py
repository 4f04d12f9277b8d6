"""A node serves the clients that it describes itself with, and gets no work where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from tests.strategies.federations import ASKED, ClientCall, KeepingGrid, federate, named
from tests.strategies.rounds import FEWER, Options


def test_a_node_that_describes_itself_badly_is_left_out(options: Options, tiny_csv: Path) -> None:
    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.describe" and context.node_id == 2:
            return Message(RecordDict({"config": ConfigRecord({"client": "client-1"})}), reply_to=message)
        return client_app(message, context)

    own = {"data-path": str(tiny_csv)}
    nodes = {1: named("client-0", **own), 2: named("client-1", **own)}
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", FEWER)
    federation = federate(overrides, grid=lambda app, config: KeepingGrid(app, config, nodes), app=call)
    assert federation.records[1].clients == ("client-0",)
    assert federation.records[1].failed["client-1"] == "not connected"


def test_a_node_that_fails_to_describe_itself_is_asked_again(options: Options) -> None:
    asked: list[int] = []

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.describe":
            asked.append(context.node_id)
            if len(asked) == 1:
                raise OSError("the disk is busy")
        return client_app(message, context)

    more = ("federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", "federation.wait=5")
    federation = federate(options("tiny_bert", "fed_sb", *more), app=call, grid=asked_grid)
    assert len(asked) == 2
    assert not federation.records[1].failed


def test_a_node_that_never_describes_itself_is_said_to_be_there(options: Options) -> None:
    def call(message: Message, context: Context) -> Message:
        raise OSError("the disk is busy")

    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1")
    with pytest.raises(RunError, match=r"0 of 5 clients are connected.*; node 1 is connected and fails to .*: the disk is busy$"):
        federate(overrides, app=call, grid=asked_grid)


def asked_grid(app: ClientCall, config: dict[str, Any]) -> KeepingGrid:
    return KeepingGrid(app, config, ASKED)


def test_a_simulated_node_is_not_asked_for_what_the_server_deals_out(options: Options) -> None:
    seen: list[str] = []

    def call(message: Message, context: Context) -> Message:
        seen.append(message.metadata.message_type)
        return client_app(message, context)

    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1", "data.client_test_fraction=0.2")
    known, asked = federate(overrides, app=call), federate(overrides, grid=asked_grid)
    assert "query.describe" not in seen
    assert known.prepared.strategy.counts == asked.prepared.strategy.counts
    assert sum(known.prepared.strategy.counts.values()) > 0


def test_a_data_path_without_a_client_is_refused(options: Options) -> None:
    """The node would train on the app's data, not on the operator's."""
    overrides = options("tiny_bert", "fed_sb", "federation.num_rounds=1", "train.local_steps=1")
    with pytest.raises(RunError, match="0 of 5 clients are connected"):
        federate(overrides, grid=lambda app, config: KeepingGrid(app, config, {1: {"data-path": "/data/mine"}}))


def test_a_node_refuses_the_work_of_another_client(options: Options, tiny_csv: Path) -> None:
    """Two nodes that name their client leave the others without a node."""
    overrides = options("tiny_bert", "fed_sb", "federation.fraction=1.0", "federation.num_rounds=1", "train.local_steps=1", FEWER)
    own = {"data-path": str(tiny_csv)}
    nodes = {1: named("client-3", **own), 2: named("client-1", **own), 3: named("nobody", **own)}
    federation = federate(overrides, grid=lambda app, config: KeepingGrid(app, config, nodes))
    assert set(federation.records[1].clients) == {"client-1", "client-3"}
    assert {e.node: e.instruction.client for e in federation.grid.rounds()[1]} == {1: "client-3", 2: "client-1"}
    assert federation.records[1].failed == dict.fromkeys(("client-0", "client-2", "client-4"), "not connected")
