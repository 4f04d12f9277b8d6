"""A node that names no client of the run, or a rank that is not its client's, gets no work and is told so."""

from __future__ import annotations

import logging

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.runtime.local import LocalGrid
from strategies import STRATEGIES
from tests.strategies.nodes import ALWAYS, run, site, told

PUPPET = {"partition-id": 0, "num-partitions": 1}


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
