"""One node serves a client at a time: a second one waits or takes its place as asked, and other data are refused."""

from __future__ import annotations

import pytest
from flwr.app import Context, Message

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from tests.strategies.nodes import ALWAYS, REPLACE, run, site, told
from tests.strategies.rounds import FEWER

THREE = "federation.num_rounds=3"


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
