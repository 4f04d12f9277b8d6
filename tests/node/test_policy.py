"""What an operator writes is held to the letter, before data are read: the data of these nodes are not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedsb.client_app import app
from fedsb.node.reading import FILE, PAIRS, read_node
from fedsb.node.refusals import KEYS as SAID
from fedsb.node.refusals import shown
from fedsb.node.settings import NodeConfig, OwnData, OwnPrivacy
from fedsb.node.values import NodeConfigError
from fedsb.privacy.codes import CODES
from fedsb.privacy.limit import Limit
from fedsb.wire.messages import Reply, decode_reply
from tests.strategies.federations import KeepingGrid

BASE = {"client": "a", "data-path": "/data/absent.csv"}
STRICT = {**BASE, "privacy": "example"}
EXAMPLE = ("privacy=example", "privacy.noise_multiplier=2")
ASKED = ("query.describe", "train", "train.evidence", "evaluate")


def answer(node: dict[str, Any], *overrides: str, kind: str = "query.describe") -> Reply:
    """Return what a node answers to a message."""
    grid = KeepingGrid(app, {"overrides": join(["data=files", "federation.names=[a]", "federation.num_clients=1", *overrides])}, {1: node})
    told = {"client": "a", "round": 1, "clients": "[]", "labels": json.dumps(["x", "y"]), "stage": "", "frozen": "", "layout": 0}
    message = Message(RecordDict({"config": ConfigRecord(told)}), 1, kind)  # type: ignore[dict-item]
    message.metadata.__dict__["_message_id"] = "asked"
    return decode_reply(app(message, grid._contexts[1]).content)


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown key": ({**BASE, "max-epsilom": 1}, "has the key 'max-epsilom' (did you mean 'max-epsilon'?)", ""),
    "another spelling": ({"client": "a", "data_path": "/data"}, "has the key 'data_path' (did you mean 'data-path'?)", ""),
    "a misspelt client": ({"clinet": "a"}, "has the key 'clinet' (did you mean 'client'?)", ""),
    "no data": ({"client": "a"}, "this node has no data-path; give its data", "data-path"),
    "nothing at all": ({}, "this node names no client", "client"),
    "no client": ({"data-path": "/data"}, "this node names no client", "client"),
    "an empty client": ({**BASE, "client": ""}, "client='' in --node-config is no name", "client"),
    "an empty path": ({**BASE, "data-path": " "}, "data-path=' ' in --node-config is no name", "data-path"),
    "simulated as well": ({**BASE, "partition-id": 0}, "has the key 'partition-id'", ""),
    "another unit": ({**BASE, "privacy": "client"}, "privacy='client' in --node-config is not known; give privacy=\"example\"", "privacy"),
    "no number": (
        {**STRICT, "max-epsilon": "one"},
        "max-epsilon='one' in --node-config is out of range; it must be a number",
        "max-epsilon",
    ),
    "a truth": ({**STRICT, "max-epsilon": True}, "max-epsilon=True in --node-config is out of range", "max-epsilon"),
    "no budget": ({**STRICT, "max-epsilon": 0}, "max-epsilon=0 in --node-config is out of range", "max-epsilon"),
    "not a number": ({**STRICT, "max-epsilon": float("nan")}, "max-epsilon=nan in --node-config is out of range", "max-epsilon"),
    "a large delta": ({**STRICT, "max-epsilon": 1, "max-delta": 1.0}, "max-delta=1.0 in --node-config is out of range", "max-delta"),
    "a budget of no unit": ({**BASE, "max-epsilon": 1}, "max-epsilon in --node-config has no effect without privacy", "max-epsilon"),
    "a delta of no budget": ({**STRICT, "max-delta": 1e-6}, "max-delta in --node-config has no effect without max-epsilon", "max-delta"),
    "noise of no unit": ({**BASE, "min-noise": 1}, "min-noise in --node-config has no effect without privacy", "min-noise"),
    "half a rank": ({**BASE, "rank": 2.5}, "rank=2.5 in --node-config is no rank; it must be a whole number of at least 1", "rank"),
    "no rank": ({**BASE, "rank": "0"}, "rank='0' in --node-config is no rank", "rank"),
    "a ledger elsewhere": ({**STRICT, "ledger": "../else"}, "ledger='../else' in --node-config must be at most 48 letters", "ledger"),
}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path))


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_read_is_said_to_every_message_by_a_code_and_in_the_nodes_own_log(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    node, line, key = MISTAKES[case]
    for kind in ASKED:
        for privacy in ((), EXAMPLE):
            said = answer(node, *privacy, kind=kind)
            assert (said.code, said.key) == (CODES["node_config"].number, key)
    assert caplog.text.count(line) == 2 * len(ASKED)


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "no privacy": (STRICT, (), "privacy.unit"),
    "that of clients": (STRICT, ("privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform"), "privacy.unit"),
    "a start without noise": (STRICT, (*EXAMPLE, "init.kind=gradient"), "privacy.init_fraction"),
    "little noise": ({**STRICT, "min-noise": "2.5"}, EXAMPLE, "privacy.noise_multiplier"),
    "the server's file": ({**BASE, "data-path": "package"}, (), "data.kind"),
    "its test file": ({**BASE, "data-path": "package"}, ("data=bbc_news", "data.test_path=/other/ward.jsonl"), "data.test_path"),
    "its public file": ({**STRICT, "data-path": "package"}, ("data=bbc_news", "data.public_path=/other/ward.jsonl"), "data.public_path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_operator_does_not_allow_is_refused_before_data_are_read(case: str) -> None:
    node, overrides, key = REFUSED[case]
    for kind in ASKED:
        said = answer(node, *overrides, kind=kind)
        assert (said.code, said.key) == (CODES["policy"].number, key)


def test_what_the_operator_allows_goes_on_to_the_data() -> None:
    for node in (BASE, {**STRICT, "max-epsilon": "3", "max-delta": 1e-6, "min-noise": 1, "ledger": "the-ward_1", "rank": "8"}):
        said = answer(node, *EXAMPLE)
        assert (said.code, said.key) == (CODES["refused"].number, "data-path")


def test_a_configuration_that_the_node_cannot_compose_is_a_code_too() -> None:
    said = answer(BASE, "privacy=example", "privacy.noise_multiplier=-1")
    assert (said.code, said.key) == (CODES["refused"].number, "privacy.noise_multiplier")
    assert answer(BASE, "no.such.key=1").code == CODES["refused"].number


def test_what_a_node_refuses_stands_in_a_log_of_its_own(tmp_path: Path) -> None:
    """Under Flower nothing else writes a warning of ours down."""
    answer(STRICT)
    [line] = (tmp_path / "node.log").read_text(encoding="utf-8").splitlines()
    assert "privacy.unit=none: this node answers privacy=example alone" in line
    assert "'query.describe' of run 1, round 1, client 'a' (overrides: data=files" in line


def test_numbers_are_read_from_strings_and_numbers() -> None:
    for most in ("3", 3, 3.0):
        said = OwnPrivacy("example", max_epsilon=3.0)
        assert read_node({**STRICT, "max-epsilon": most}) == NodeConfig("a", OwnData("/data/absent.csv"), privacy=said)
    node = read_node({"client": 7, "data-path": "package"})
    assert node is not None
    assert (node.client, node.data_path) == ("7", None)


def test_the_operators_budget_is_judged_at_the_smaller_delta() -> None:
    node = read_node({**STRICT, "max-epsilon": 3, "max-delta": "1e-6"})
    assert node is not None
    assert node.budgets(1e-5) == (Limit(3.0, 1e-6, "the node's max_epsilon"),)
    assert node.budgets(1e-7) == (Limit(3.0, 1e-7, "the node's max_epsilon"),)
    assert NodeConfig("a", OwnData("package"), privacy=OwnPrivacy("example")).budgets(1e-5) == ()


def test_a_simulated_node_has_no_policy() -> None:
    assert read_node({"partition-id": 0, "num-partitions": 2}) is None


@given(
    st.dictionaries(
        st.sampled_from([*PAIRS, FILE, "data_path", "x"]), st.one_of(st.text(max_size=3), st.integers(), st.floats(), st.booleans())
    )
)
def test_a_node_with_any_configuration_of_its_own_is_held_to_it(node: dict[str, Any]) -> None:
    """It is never taken for a simulated one, and never serves without a client and data."""
    try:
        read = read_node(node)
    except NodeConfigError:
        return
    assert read is not None
    assert read.client
    assert {"client", "data-path"} <= node.keys() <= PAIRS.keys()


def test_only_keys_that_exist_are_shown() -> None:
    assert shown(3, "data.label").endswith("(key at fault: data.label)")
    assert shown(3, "a patient's name") == shown(3, "") == CODES["refused"].text
    assert {"data.label", "privacy.unit", "model.name", "seed", "data-path", "ledger"} <= SAID
    assert not {"data", "data.config.anything"} & SAID
