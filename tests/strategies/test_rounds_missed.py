"""A client that joins late or lost its cache holds the weights of all others, and costs what it is sent again."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message

from fedsb.app.frozen_stores import forget_stores
from fedsb.client_app import app as client_app
from fedsb.core.state import Name
from fedsb.models.build import forget_models
from fedsb.wire.frozen import ROOT
from fedsb.wire.messages import decode_instruction
from tests.strategies.federations import ClientCall, KeepingGrid, federate, in_rounds, next_instructions, split_nodes
from tests.strategies.rounds import FAMILIES, FEWER, LOGS, METHODS, Options


class ClubGrid(KeepingGrid):
    """One node a client, named by its operator; ``absent`` nodes are not online before a round."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], absent: dict[int, int], folder: Path) -> None:
        super().__init__(app, run_config, split_nodes(folder, shlex.split(run_config["overrides"]), 5))
        self._absent = absent

    def get_node_ids(self) -> list[int]:
        coming = max(self.rounds(), default=0) + 1
        return [node for node in super().get_node_ids() if coming >= self._absent.get(node, 0)]


def in_own_homes(folder: Path, lost: Callable[[str, int], bool]) -> ClientCall:
    """Return a ClientApp that works for each client as a process of its own, with a cache of its own that may get lost."""

    def call(message: Message, context: Context) -> Message:
        if message.metadata.message_type.startswith("query."):
            return client_app(message, context)
        instruction = decode_instruction(message.content)
        home = folder / instruction.client
        if lost(instruction.client, instruction.round):
            shutil.rmtree(home, ignore_errors=True)
        os.environ["FEDSB_HOME"] = str(home)
        forget_stores()
        return client_app(message, context)

    return call


MADE = [name for name in METHODS if FAMILIES[name].made]


@pytest.mark.parametrize("method", MADE)
def test_what_everybody_makes_is_made_where_it_is_lost_and_read_where_it_is_kept(options: Options, method: str, tmp_path: Path) -> None:
    """Each message has a process of its own; client-4 joins late, client-1 loses its disk, and what client-2 has kept is damaged."""
    homes, files = tmp_path / "homes", dict[tuple[str, int], tuple[int, bytes]]()
    call = in_own_homes(homes, lambda client, number: (client, number) == ("client-1", 3))

    def app(message: Message, context: Context) -> Message:
        forget_models()
        told = message.content.config_records["config"]
        file = homes / str(told.get("client")) / "start.safetensors"
        if (told.get("client"), told.get("round")) == ("client-2", 3):
            file.write_bytes(file.read_bytes()[:-1])
        reply = call(message, context)
        if "round" in told:
            files[str(told["client"]), int(told["round"])] = file.stat().st_mtime_ns, file.read_bytes()  # type: ignore[arg-type]
        return reply

    overrides = options("tiny_bert", method, "federation.fraction=1.0", FEWER, "federation.num_rounds=3")
    found = federate(overrides, grid=lambda a, c: ClubGrid(a, c, {5: 3}, tmp_path / "data"), app=app)
    forget_models()
    assert [r.failed for r in found.records[1:]] == [{"client-4": "not connected"}] * 2 + [{}]
    assert [r.payload_one_off for r in found.records] == [0] * 4
    assert len({content for _, content in files.values()}) == 1
    again = {client for client in ("client-0", "client-1", "client-2", "client-3") if files[client, 3][0] != files[client, 2][0]}
    assert again == {"client-1", "client-2"}


@pytest.mark.parametrize("method", LOGS.values())
def test_a_client_that_joins_late_holds_the_same_weights(options: Options, method: str, tmp_path: Path) -> None:
    """client-4 is not there before round 3."""
    overrides = options("tiny_bert", method, "federation.fraction=1.0", FEWER)
    app = in_own_homes(tmp_path / "homes", lambda client, number: False)
    late = federate(overrides, grid=lambda a, c: ClubGrid(a, c, {5: 3}, tmp_path / "data"), app=app)
    assert [r.failed for r in late.records[1:3]] == [{"client-4": "not connected"}] * 2
    assert not any(r.failed for r in late.records[3:])
    rounds = late.grid.rounds()
    bundle = next(e for e in rounds[3] if e.instruction.client == "client-4").instruction.bundle
    assert bundle is not None
    assert bundle.parent == ROOT
    assert rounds[3][0].instruction.frozen == bundle.head
    for _, _, after in next_instructions(late, tmp_path / "check"):
        assert all(torch.equal(held.weights[m], after[0].weights[m]) for held in after for m in held.weights)


@pytest.mark.parametrize("method", LOGS.values())
def test_a_lost_cache_costs_bytes_and_nothing_else(options: Options, method: str, tmp_path: Path) -> None:
    overrides = options("tiny_bert", method, "federation.fraction=1.0", in_rounds(3), "train.local_steps=1")
    club = partial(ClubGrid, absent={}, folder=tmp_path / "data")
    kept = federate(overrides, grid=club, app=in_own_homes(tmp_path / "kept", lambda client, number: False))
    lost = federate(overrides, grid=club, app=in_own_homes(tmp_path / "lost", lambda client, n: (client, n) == ("client-1", 3)))
    assert kept.sha256 == lost.sha256
    again = [e for e in lost.grid.rounds()[3] if e.instruction.client == "client-1"]
    assert not lost.records[3].failed
    given = again[0].instruction.bundle
    if given is not None and given.parent == ROOT:  # all that it had held is superseded: nothing is missed
        assert [e.answer.missing for e in again] == [False]
        assert lost.payload() == kept.payload()
        return
    assert [e.answer.missing for e in again] == [True, False]
    # The first request is paid for, and the second with the whole log; what held the basis is one-off, the rest goes down.
    bundle = again[1].instruction.bundle
    assert bundle is not None
    versions = {name: (name.role.split("@")[0], int(name.role.split("@")[1])) for name in bundle.state}
    first = lost.frozen.first
    once = sum(t.numel() for name, t in bundle.state.items() if first.get(Name(name.module, versions[name][0])) == versions[name][1])
    trained = 4 * lost.prepared.adapted.layouts.down.numel
    assert lost.records[3].payload_down - kept.records[3].payload_down == trained + 4 * (bundle.state.numel - once)
    assert lost.records[3].payload_one_off - kept.records[3].payload_one_off == 4 * once
    assert lost.records[3].payload_up == kept.records[3].payload_up
    assert lost.payload()[0] == kept.payload()[0]
