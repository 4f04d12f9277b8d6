"""Nodes of a real federation: two that name one client, one that comes back, other data, unknown names, and who is waited for."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.runtime.local import LocalGrid
from strategies import STRATEGIES, roster
from tests.conftest import made_rows
from tests.strategies.federations import ClientCall, Federation, KeepingGrid, classification, federate, named

PUPPET = {"partition-id": 0, "num-partitions": 1}
TWO = ("federation.num_clients=2", "federation.partition.sizes=null", "federation.partition.kind=iid", "train.local_steps=1")
REPLACE = "federation.replace_nodes=true"
THREE = "federation.num_rounds=3"
FEWER = "federation.min_replies=1"


class Nodes(KeepingGrid):
    """Named nodes, each with the rounds in which it is online."""

    def __init__(self, app: ClientCall, run_config: dict[str, Any], nodes: Mapping[int, tuple[dict[str, Any], range]]) -> None:
        super().__init__(app, run_config, {node: config for node, (config, _) in nodes.items()})
        self._online = {node: rounds for node, (_, rounds) in nodes.items()}

    def get_node_ids(self) -> list[int]:
        coming = max(self.rounds(), default=0) + 1
        return [node for node, rounds in self._online.items() if coming in rounds]


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))


@pytest.fixture
def tables(tmp_path: Path) -> dict[int, Path]:
    """Tables by their number of rows."""
    rows, found = made_rows(), {}
    for count in (20, 21, 30):
        found[count] = tmp_path / f"{count}.csv"
        found[count].write_text("\n".join(["text,label", *(f"{text},{label}" for text, label in rows[:count])]) + "\n")
    return found


def site(client: str, path: Path) -> dict[str, Any]:
    return named(client, **{"data-path": str(path)})


def run(bert: Path, table: Path, nodes: Mapping[int, tuple[dict[str, Any], range]], *more: str, app: ClientCall = client_app) -> Federation:
    overrides = [*classification(bert, table), *TWO, "init.kind=weight_svd", "federation.num_rounds=2", *more]
    return federate(overrides, grid=lambda a, c: Nodes(a, c, nodes), app=app)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the nodes have written to their logs."""
    return [record.getMessage() for record in caplog.records if record.name == "fedsb.client_app"]


ALWAYS = range(1, 9)


def test_two_nodes_that_name_one_client_keep_each_other_out(tiny_bert, tiny_csv, tables, caplog) -> None:
    nodes = {
        1: (site("client-0", tables[20]), ALWAYS),
        2: (site("client-1", tables[20]), ALWAYS),
        7: (site("client-1", tables[20]), ALWAYS),
    }
    with pytest.raises(RunError, match=r"only 1 of 2 clients are connected, 2 are needed.*client-1 \(nodes 2 and 7 both name it; stop one"):
        run(tiny_bert, tiny_csv, nodes)
    assert [line for line in told(caplog) if "as 'client-1': nodes 2 and 7 both name it" in line] == told(caplog)
    assert len(told(caplog)) == 2


def test_a_second_node_does_not_take_the_place_of_one_that_serves(tiny_bert, tiny_csv, tables, caplog) -> None:
    pair = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20]), ALWAYS)}
    alone = run(tiny_bert, tiny_csv, pair, THREE)
    crowd = run(tiny_bert, tiny_csv, {**pair, 0: (site("client-1", tables[30]), range(2, 9))}, THREE)
    assert crowd.sha256 == alone.sha256
    assert {e.node for e in crowd.grid.exchanges} == {1, 2}
    assert crowd.records[2].remarks == ("client-1: node 0 names it too and gets no work, node 2 serves it",)
    assert not crowd.records[2].failed
    assert any("this node serves 'client-1'; node 0 names it too" in line for line in told(caplog))
    assert any("this node gets no work: it names 'client-1', and so does node 2" in line for line in told(caplog))


def test_a_later_node_takes_the_place_where_that_is_asked_for(tiny_bert, tiny_csv, tables) -> None:
    nodes = {
        1: (site("client-0", tables[20]), ALWAYS),
        2: (site("client-1", tables[20]), ALWAYS),
        0: (site("client-1", tables[30]), range(2, 9)),
    }
    found = run(tiny_bert, tiny_csv, nodes, REPLACE)
    assert {e.node for e in found.grid.rounds()[2]} == {0, 1}
    [remark, _] = found.records[2].remarks
    assert remark == (
        "client-1: node 0 serves it in place of node 2, as federation.replace_nodes=true says, with 30 examples where there were 20"
    )


def test_a_node_that_is_started_again_comes_back(tiny_bert, tiny_csv, tables) -> None:
    """It has another number, and the one before is offline."""
    nodes = {
        1: (site("client-0", tables[20]), ALWAYS),
        2: (site("client-1", tables[20]), range(1, 2)),
        3: (site("client-1", tables[20]), range(2, 9)),
    }
    found = run(tiny_bert, tiny_csv, nodes)
    assert {e.node for e in found.grid.rounds()[2]} == {1, 3}
    assert found.records[2].remarks == ("client-1: node 3 serves it in place of node 2, which has gone",)
    assert found.sha256 == run(tiny_bert, tiny_csv, {1: nodes[1], 2: (nodes[2][0], ALWAYS)}).sha256


def test_a_node_that_comes_back_with_other_data_is_refused(tiny_bert, tiny_csv, tables, caplog) -> None:
    nodes = {
        1: (site("client-0", tables[20]), ALWAYS),
        2: (site("client-1", tables[20]), range(1, 2)),
        3: (site("client-1", tables[21]), range(2, 9)),
    }
    with pytest.raises(RunError, match=r"client-1 \(node 3 has 21 examples, and there were 20 when the run began; bring them back"):
        run(tiny_bert, tiny_csv, nodes)
    assert any("this node gets no work as 'client-1': node 3 has 21 examples" in line for line in told(caplog))
    fewer = run(tiny_bert, tiny_csv, nodes, FEWER)
    assert set(fewer.records[2].failed) == {"client-1"}
    assert "node 3 has 21 examples" in fewer.records[2].failed["client-1"]
    replaced = run(tiny_bert, tiny_csv, nodes, REPLACE)
    assert not replaced.records[2].failed
    assert "with 21 examples where there were 20" in replaced.records[2].remarks[0]


@pytest.mark.parametrize("more", [(FEWER,), (REPLACE,)], ids=["refused", "replaced"])
def test_a_client_whose_data_change_between_rounds_fails(more: tuple[str, ...], tiny_bert, tiny_csv, tables) -> None:
    def call(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        if context.node_id == 2 and config.get("round") == 2:
            context = Context(1, 2, site("client-1", tables[30]), context.state, context.run_config)
        return client_app(message, context)

    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("client-1", tables[20]), ALWAYS)}
    found = run(tiny_bert, tiny_csv, nodes, *more, app=call).records[2]
    if more == (REPLACE,):
        assert (found.failed, found.remarks) == ({}, ("client-1: it has 30 examples where there were 20",))
    else:
        assert found.clients == ("client-0",)
        assert found.failed["client-1"].startswith("the client has 30 examples, and there were 20 when the run began; bring them back")


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


def test_a_node_with_an_unknown_name_is_told_so(tiny_bert, tiny_csv, tables, caplog) -> None:
    nodes = {1: (site("client-0", tables[20]), ALWAYS), 2: (site("clinet-1", tables[20]), ALWAYS)}
    with pytest.raises(RunError, match=r"client-1 \(not connected\); node 2 names 'clinet-1', which is no client of this run$"):
        run(tiny_bert, tiny_csv, nodes)
    assert told(caplog) == ["run 1: this node gets no work: it names 'clinet-1', which is no client of this run; known: client-0, client-1"]


@pytest.mark.parametrize("first", [True, False])
def test_a_node_told_what_a_simulated_one_is_gets_no_work_beside_named_ones(first: bool, tiny_bert, tiny_csv, tables, caplog) -> None:
    """It would train, in a missing client's place, on what the server's configuration names; nor do its counts stand for theirs."""
    one, two = (site(f"client-{i}", tables[20]) for i in (0, 1))
    nameless = 1 if first else 9
    with pytest.raises(RunError, match=rf"client-1 \(not connected\); node {nameless} names no client; start it with --node-config"):
        run(tiny_bert, tiny_csv, {2: (one, ALWAYS), nameless: (PUPPET, ALWAYS)})
    assert [line for line in told(caplog) if line.startswith("run 1: this node gets no work: it names no client; start it with")]
    found = run(tiny_bert, tiny_csv, {2: (one, ALWAYS), 3: (two, ALWAYS), nameless: (PUPPET, ALWAYS)})
    assert {(e.node, e.answer.num_examples) for e in found.grid.exchanges} == {(2, 20), (3, 20)}
    assert not found.records[2].failed


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


def test_a_notice_is_one_plain_line(caplog: pytest.LogCaptureFixture) -> None:
    grid = LocalGrid(client_app, {"overrides": ""}, {1: {"client": "a"}})
    with caplog.at_level(logging.WARNING):
        grid.send_and_receive([Message(RecordDict({"config": ConfigRecord({"notice": "a\nb\x1b[31m" + "c" * 900})}), 1, "query.notice")])
    [line] = told(caplog)
    assert line.startswith("run 1: a b [31mc")
    assert len(line) <= len("run 1: ") + 500


def test_nodes_have_ranks_of_their_own_where_the_run_gives_none(tiny_bert, tiny_csv, tables, capsys) -> None:
    plain = {number: (site(f"client-{number - 1}", tables[20]), ALWAYS) for number in (1, 2)}
    own = {number: ({**config, "rank": number}, rounds) for number, (config, rounds) in plain.items()}
    for method in (name for name, strategy in STRATEGIES.items() if strategy.any_rank):
        more = (f"method={method}", "init.kind=null", "rank=2", "progress=lines")
        told, given = run(tiny_bert, tiny_csv, own, *more), run(tiny_bert, tiny_csv, plain, *more, "federation.ranks=[1,2]")
        both = run(tiny_bert, tiny_csv, own, *more, "federation.ranks=[1,2]")
        assert told.sha256 == given.sha256 == both.sha256
        assert told.payload() == given.payload()
        assert not any(record.failed for record in told.records)
        assert run(tiny_bert, tiny_csv, plain, *more).sha256 != told.sha256
    assert "client-0: its node has rank 1" in capsys.readouterr().out


RANKS = {
    "of the run": (1, ("method=flora", "federation.ranks=[2,2]"), "and federation.ranks gives that client 2; make the two equal, or leave"),
    "of all": (1, ("method=fedavg_lora",), "and this method has one rank for all, 2; leave rank out of its --node-config, or take"),
    "of the server": (3, ("method=flora",), "and the server keeps rank=2; begin the run with rank=3, or lower that of the node"),
}


@pytest.mark.parametrize("name", RANKS)
def test_a_node_whose_rank_is_not_that_of_its_client_gets_no_work(name: str, tiny_bert, tiny_csv, tables, caplog) -> None:
    rank, more, why = RANKS[name]
    nodes = {
        1: (site("client-0", tables[20]), ALWAYS),
        2: ({**site("client-1", tables[20]), "rank": str(rank)}, ALWAYS),
    }
    with pytest.raises(RunError, match=rf"client-1 \(node 2, which serves 'client-1' with rank={rank}, {why}[^\n]*\)$"):
        run(tiny_bert, tiny_csv, nodes, *more, "init.kind=null", "rank=2")
    assert any(f"this node gets no work: it serves 'client-1' with rank={rank}, {why}" in line for line in told(caplog))


def test_the_rank_of_all_may_be_said(tiny_bert, tiny_csv, tables) -> None:
    for method in ("fedavg_lora", "head_only"):
        for rank in ({}, {"rank": 2}):
            nodes = {number: ({**site(f"client-{number - 1}", tables[20]), **rank}, ALWAYS) for number in (1, 2)}
            found = run(tiny_bert, tiny_csv, nodes, f"method={method}", "init.kind=null", "rank=2")
            assert not any(record.failed for record in found.records)
