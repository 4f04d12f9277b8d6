"""A run waits for all of its clients, says for whom and why, and goes on with fewer where that is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message

from fedsb.core.errors import RunError
from strategies import roster
from tests.strategies.federations import ClientCall, KeepingGrid, classification, federate
from tests.strategies.nodes import ALWAYS, TWO, Nodes, run, site
from tests.strategies.rounds import FEWER


def test_a_real_federation_needs_all_of_its_clients_unless_fewer_are_asked_for(tiny_bert, tiny_csv, tables, caplog) -> None:
    """And the reason of who is missing is the true one."""
    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20].with_name("absent.csv")), ALWAYS)}
    with pytest.raises(
        RunError,
        match=r"only 1 of 2 .*, 2 are needed unless federation.min_replies says.*client-1 \(node 2, code 3, .*data-path",
    ):
        run(tiny_bert, tiny_csv, nodes, "privacy=example", "privacy.epsilon=8")
    with pytest.raises(RunError, match=r"client-1 \(not connected\)$"):
        run(tiny_bert, tiny_csv, {1: nodes[1]})
    assert run(tiny_bert, tiny_csv, {1: nodes[1]}, FEWER).records[2].failed == {"client-1": "not connected"}


def test_a_round_that_lacks_a_client_stops_before_it_asks_the_others(tiny_bert, tiny_csv, tables) -> None:
    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20]), range(1, 2))}
    grids = []

    def grid(app: ClientCall, config: dict[str, Any]) -> Nodes:
        grids.append(Nodes(app, config, nodes))
        return grids[0]

    overrides = [*classification(tiny_bert, tiny_csv), *TWO, "init.kind=weight_svd", "federation.num_rounds=2"]
    with pytest.raises(RunError, match=r"missing: client-1 \(its node 2 has gone\)$"):
        federate(overrides, grid=grid)
    assert max(grids[0].rounds()) == 1


def test_who_is_waited_for_is_shown(tiny_bert, tiny_csv, tables, capsys, monkeypatch) -> None:
    """The missing node comes at the fifth look."""

    class Late(KeepingGrid):
        looks = 0

        def get_node_ids(self) -> list[int]:
            self.looks += 1
            return [1, 3] if self.looks < 5 else [1, 2, 3]

    monkeypatch.setattr(roster, "SHOW_S", 0.0)
    nodes = {1: site("client-0", tables[20]), 2: site("client-1", tables[20]), 3: site("clinet-1", tables[20])}
    overrides = [*classification(tiny_bert, tiny_csv), *TWO, "init.kind=weight_svd", "federation.num_rounds=1", "federation.wait=60"]
    found = federate(overrides, grid=lambda app, config: Late(app, config, nodes))
    assert not found.records[1].failed
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting for ")]
    assert len(shown) == 4
    assert all(line.startswith("waiting for client-1 (not connected); node 3 names 'clinet-1', which is no client") for line in shown)


class Slow(Nodes):
    """Named nodes of which one, which reads its data for a long time, has its answer arrive at a late look only."""

    def __init__(self, app: ClientCall, config: dict[str, Any], nodes: Mapping[int, tuple[dict[str, Any], range]], slow: int, look: float):
        super().__init__(app, config, nodes)
        self._slow, self._look = slow, look
        self._held: list[Message] = []
        self._looks = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        arrived = super().pull_messages(message_ids)
        self._held += [reply for reply in arrived if reply.metadata.src_node_id == self._slow and "clients" in asked_with(self, reply)]
        self._looks += bool(self._held)
        kept = [reply for reply in arrived if reply not in self._held]
        return [*kept, *self._held] if self._looks == self._look else kept


def asked_with(grid: KeepingGrid, reply: Message) -> ConfigRecord:
    return grid._pushed[reply.metadata.reply_to_message_id].content.config_records["config"]


def test_a_node_that_is_still_answering_is_named_beside_who_is_missing(tiny_bert, tiny_csv, tables, capsys, monkeypatch) -> None:
    monkeypatch.setattr(roster, "SHOW_S", 0.0)
    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20]), ALWAYS)}
    overrides = [*classification(tiny_bert, tiny_csv), *TWO, "init.kind=weight_svd", "federation.num_rounds=1"]
    found = federate(overrides, grid=lambda app, config: Slow(app, config, nodes, slow=2, look=4))
    assert not found.records[1].failed
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("waiting for ")]
    assert shown
    told = r"waiting for client-1 \(no node that has answered names it\); node 2 was asked and has not answered yet \(for \d s\); \d s of "
    assert all(re.match(told, line) for line in shown)


def test_a_record_says_that_an_answer_is_awaited(tiny_bert, tiny_csv, tables) -> None:
    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20]), range(2, 9))}
    overrides = [*classification(tiny_bert, tiny_csv), *TWO, "init.kind=weight_svd", "federation.num_rounds=2", FEWER]
    found = federate(overrides, grid=lambda app, config: Slow(app, config, nodes, slow=2, look=math.inf))
    assert [record.failed for record in found.records[1:]] == [
        {"client-1": "not connected"},
        {"client-1": "no node that has answered names it"},
    ]
