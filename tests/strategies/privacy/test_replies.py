"""Laws of what a client under privacy.unit=example says: its account, a code, the same bytes again; and what a failure costs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.common.serde import recorddict_to_proto

from fedsb.app.assembly import _MEMO
from fedsb.app.frozen_stores import forget_stores
from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.core.folders import home
from fedsb.core.state import Layout
from fedsb.privacy.account import ALLOWED
from fedsb.privacy.codes import CODES
from fedsb.wire.messages import encode_code
from strategies.inbox import Inbox
from strategies.rounds import ACCOUNT
from tests.strategies.federations import ASKED, named
from tests.strategies.private_runs import (
    CLIENT,
    EXAMPLE,
    Watch,
    answering,
    asked,
    breaking,
    ledger_lines,
    metrics_of,
    rdp_epsilon,
    run_privately,
    small,
    write_table,
)

METHODS = ("fed_sb", "fedavg_lora", "fedex_lora", "head_only")
START = ("init.kind=gradient", "init.num_examples=10")


def held(reply: Message) -> bytes:
    return recorddict_to_proto(reply.content).SerializeToString(deterministic=True)


@pytest.mark.parametrize("method", METHODS)
def test_a_reply_carries_its_account_and_nothing_of_the_data(method: str, tiny_bert: Path, tmp_path: Path) -> None:
    """The same federation on other texts, with a client that fails: every figure of every reply is the same."""
    more = (*EXAMPLE, *START, "privacy.init_fraction=0.3", "init.power_iterations=0") if method == "fed_sb" else EXAMPLE
    said = []
    for name, text in (("ours", None), ("theirs", lambda i, label: f"{['goal', 'price', 'actor'][i * i % 3]} last week " * (1 + i % 3))):
        (folder := tmp_path / name).mkdir()
        overrides = small(tiny_bert, folder, f"method={method}", *more)
        if text:
            write_table(folder / "train.csv", 80, text)
        watch = Watch(breaking("client-2", 1))
        run_privately(overrides, folder / "run", app=watch, nodes=ASKED)
        said.append([(message.metadata.message_type, *asked(message), reply) for message, reply in watch.seen])
    ours, theirs = said
    assert [step[:3] for step in ours] == [step[:3] for step in theirs]
    assert len(ours) == 1 + 8 + (8 if method == "fed_sb" else 0)
    for (kind, client, number, mine), (*_, yours) in zip(ours, theirs, strict=True):
        assert not mine.has_error()
        assert metrics_of(mine) == metrics_of(yours)
        if kind == "query.describe":
            assert {key: set(record) for key, record in mine.content.items()} == {
                "config": {"client", "counted"},
                "metrics": {"num-examples"},
            }
        elif (client, number) == ("client-2", 1):
            assert {key: dict(record) for key, record in mine.content.items()} == {"metrics": {"code": 1}}
        else:
            assert set(mine.content) == {"arrays", "metrics"}
            assert set(metrics_of(mine)) == ALLOWED - {"encoding-error"}
            assert held(mine) != held(yours)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_what_the_wire_took_is_measured_on_noised_arrays(dtype: str, tiny_bert: Path, tmp_path: Path) -> None:
    """And what int8 leaves out for the next round is of noised arrays, and no more of them is said for it."""
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, f"federation.wire_dtype={dtype}"), tmp_path / "run")
    assert all(set(metrics_of(e.reply)) == ALLOWED for e in run.grid.exchanges)
    assert len({tuple((key, tuple(array.shape)) for key, array in e.reply.content["arrays"].items()) for e in run.grid.exchanges}) == 1


@pytest.mark.parametrize("unit", ["none", "client"])
def test_an_exception_leaves_a_real_node_as_a_code_and_a_key(
    unit: str, tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An operator's file breaks between two messages: the error names a label of the data. The text is for the node's own log."""
    more = {"none": (), "client": CLIENT}[unit]
    overrides = small(tiny_bert, tmp_path, *more, "federation.num_clients=2", "federation.names=[a,b]")
    sites = {name: write_table(tmp_path / f"{name}.csv", 20) for name in "ab"}

    def app(message: Message, context: Context) -> Message:
        if asked(message) == ("a", 2):
            sites["a"].write_text("text,label\nhe said,secret-diagnosis\n")
            forget_rows()
        return client_app(message, context)

    nodes = {1: named("a", **{"data-path": str(sites["a"])}), 2: named("b", **{"data-path": str(sites["b"])})}
    run = run_privately(overrides, tmp_path / "run", app=app, nodes=nodes)
    [reply] = [e.reply for e in run.grid.rounds()[2] if e.instruction.client == "a"]
    code = CODES["refused"]
    assert {key: dict(record) for key, record in reply.content.items()} == {
        "metrics": {"code": code.number},
        "config": {"key": "data.labels"},
    }
    assert run.records[2].failed == {"a": f"{code.text} (key at fault: data.labels)"}
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "run").glob("*.*l*"))
    assert run.records[2].clients == ("b",)
    [line] = [record.getMessage() for record in caplog.records if record.name == "fedsb.app.answering"]
    assert "secret-diagnosis" in line
    assert all(told in line for told in ("'train' of run 1, round 2, client 'a'", "overrides: model=pretrained"))


def test_a_simulated_client_without_privacy_says_it_all(tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path), tmp_path / "run", app=breaking("client-2", 1))
    assert "too many dimensions 'str'" in run.records[1].failed["client-2"]


def forget_rows() -> None:
    """Let the process read its clients' rows anew, as one that was restarted."""
    for kind in ("features", "site"):
        _MEMO.pop(kind, None)


def test_a_repeated_request_gets_the_same_bytes_and_costs_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    repeated = []

    def twice(message: Message, context: Context) -> Message:
        first, second = client_app(message, context), client_app(message, context)
        if asked(message)[0]:
            repeated.append((held(first), held(second)))
        return second

    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, *START, "privacy.init_fraction=0.3"), tmp_path / "run", app=twice)
    assert len(repeated) == 24
    assert all(first == second for first, second in repeated)
    keys = [tuple(charge["key"]) for charge in ledger_lines(run.folder, "client-0")]
    assert len(keys) == len(set(keys)) == 6


def test_catching_up_with_frozen_state_is_not_charged(tiny_bert: Path, tmp_path: Path) -> None:
    """Under FedEx the clients lose the residuals before round 3, and the first one is asked twice."""

    def app(message: Message, context: Context) -> Message:
        if asked(message) == ("client-0", 3) and not lost:
            lost.append(True)
            shutil.rmtree(home() / "frozen")
            forget_stores()
        return client_app(message, context)

    lost: list[bool] = []
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, "method=fedex_lora", "federation.num_rounds=3"), tmp_path / "run", app=app)
    again = [e.answer.missing for e in run.grid.rounds()[3] if e.instruction.client == "client-0"]
    assert again == [True, False]
    assert not run.records[3].failed
    assert [charge["key"][1] for charge in ledger_lines(run.folder, "client-0")] == [1, 2, 3]


def test_a_client_that_fails_after_its_charge_counts(tiny_bert: Path, tmp_path: Path) -> None:
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE), tmp_path / "run", app=breaking("client-2", 2))
    assert run.records[2].failed == {"client-2": CODES["failed"].text}
    epsilon = run.records[2].epsilon
    assert epsilon is not None
    assert epsilon["clients"]["client-2"]["epsilon"] == pytest.approx(rdp_epsilon([(2.0, 0.5, 4)]), rel=1e-3)
    assert epsilon["silent"] == []


CHECKS = [name for name, code in CODES.items() if code.stops]


def test_a_failed_self_check_stops_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    """Whoever had been asked counts as charged, in the record of the round that stopped."""
    code = CODES["clipped_sum"]
    few = ("federation.num_clients=2", "train.local_steps=1")
    app = answering("client-0", 1, lambda: encode_code(code.number))
    run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, *few, rows=40), tmp_path / "run", app=app)
    assert str(run.error) == f"client-0: {code.text}"
    last = run.records[-1]
    assert last.round == 1
    assert last.failed == {"client-0": str(run.error), "client-1": "the run stopped before its reply counted"}
    assert last.epsilon is not None
    assert last.epsilon["clients"]["client-0"]["epsilon"] == pytest.approx(rdp_epsilon([(2.0, 0.5, 1)]), rel=1e-3)


@pytest.mark.parametrize("check", CHECKS)
def test_each_self_check_stops_a_run_by_its_name(check: str) -> None:
    failed: dict[str, str] = {}
    inbox = Inbox(["a", "b", "c"], Layout(()), failed)
    asked_for = Message(encode_code(0), 1, "train")
    with pytest.raises(RunError, match=re.escape(f"b: {CODES[check].text}")):
        list(inbox.put("b", Message(encode_code(CODES[check].number), reply_to=asked_for)))
    assert set(failed) == {"a", "b", "c"}


FIXED = ("clipped_sum", "dependence", "base", "steps", "sampler", "examples", "company", "hooks", "bound", "noise")


def test_the_numbers_of_the_codes_are_fixed() -> None:
    """They travel between nodes and servers of different versions."""
    numbers, checks = {name: code.number for name, code in CODES.items()}, {name: 11 + i for i, name in enumerate(FIXED)}
    assert numbers == {
        "failed": 1,
        "budget": 2,
        "refused": 3,
        "policy": 4,
        "node_config": 5,
        "own_state": 6,
        "start": 7,
        "model": 8,
        "time": 9,
        "worker": 10,
        "version": 21,
        "secure": 22,
        "unsigned": 23,
        "layout": 24,
        "flower": 25,
        **checks,
    }
    assert set(CHECKS) <= set(FIXED)
    assert set(ACCOUNT) <= ALLOWED
