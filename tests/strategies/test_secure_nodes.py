"""Secure sums over nodes whose operators ask for them, and sign the keys of each sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsb.client_app import app as client_app
from fedsb.core.errors import RunError
from fedsb.core.folders import home
from fedsb.federation.certificates import node_key
from fedsb.node.reading import FILE
from fedsb.privacy.codes import CODES
from tests.strategies.federations import ClientCall, Federation, KeepingGrid, classification, federate
from tests.strategies.test_secure_sum import lacking

CLIENTS = ("client-0", "client-1", "client-2")
SECURE = ("federation.secure_sum=true", "federation.exactness=false")


@pytest.fixture
def nodes(tables: dict[int, Path], tmp_path: Path) -> dict[int, dict[str, Any]]:
    """Three nodes with tables of their own, each with a key and a list of the others'."""
    for client, table in zip(CLIENTS, tables.values(), strict=True):
        node_key(tmp_path / client)
        secure = {"required": True, "key": client, "peers": "peers"}
        said = {"client": client, "data": {"path": str(table)}, "device": "cpu", "secure": secure}
        (tmp_path / f"{client}.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    (tmp_path / "peers").write_text("".join(f"{client} {(tmp_path / f'{client}.pub').read_text()}" for client in CLIENTS))
    return {i: {FILE: str(tmp_path / f"{client}.yaml")} for i, client in enumerate(CLIENTS, 1)}


def run(
    bert: Path,
    table: Path,
    nodes: dict[int, dict[str, Any]],
    *more: str,
    app: ClientCall = client_app,
    kept: list[KeepingGrid] | None = None,
) -> Federation:
    """Run a round of the three; the grid is in ``kept`` also where the run stops."""
    three = ("federation.num_clients=3", "federation.partition.sizes=[1,1,1]", "init.kind=weight_svd", "federation.num_rounds=1")

    def grid(app: ClientCall, config: dict[str, Any]) -> KeepingGrid:
        made = KeepingGrid(app, config, nodes)
        if kept is not None:
            kept.append(made)
        return made

    return federate([*classification(bert, table), *three, *more], grid=grid, app=app)


def test_signed_keys_are_taken_and_what_is_kept_lies_at_the_node(nodes: dict[int, dict[str, Any]], tiny_bert: Path, tiny_csv: Path) -> None:
    secure = run(tiny_bert, tiny_csv, nodes, *SECURE)
    assert sorted(secure.records[1].clients) == [*CLIENTS]
    assert not secure.records[1].failed
    kept = home() / "secure" / secure.prepared.strategy.origin
    assert sorted(path.name for path in kept.iterdir()) == [*CLIENTS]


def test_a_forged_client_is_refused_by_a_code_and_nobody_gives_it_a_share(
    nodes: dict[int, dict[str, Any]], tiny_bert: Path, tiny_csv: Path, tmp_path: Path
) -> None:
    """The server serves a client itself, with a key that is not the one that the others know for it."""
    node_key(tmp_path / "another")
    forger = tmp_path / "client-2.yaml"
    forger.write_text(forger.read_text().replace("key: client-2", "key: another"))
    grids: list[KeepingGrid] = []
    with pytest.raises(RunError, match="round 1: 1 of 3 clients gave shares of their keys, and a secure sum needs 3"):
        run(tiny_bert, tiny_csv, nodes, *SECURE, kept=grids)
    answers = {e.instruction.client: e.answer.code for e in grids[0].exchanges if e.kind == "train.shares"}
    assert answers == {"client-0": CODES["unsigned"].number, "client-1": CODES["unsigned"].number, "client-2": 0}
    assert not [e for e in grids[0].exchanges if e.kind == "train"]


def test_a_node_that_asks_for_secure_sums_gives_nothing_to_others(
    nodes: dict[int, dict[str, Any]], tiny_bert: Path, tiny_csv: Path
) -> None:
    with pytest.raises(RunError, match=r"only 0 of 3 clients are connected.*federation\.secure_sum"):
        run(tiny_bert, tiny_csv, nodes)


@pytest.mark.parametrize("fewer", [(), ("federation.min_replies=2",)], ids=["all must answer", "two are enough"])
def test_on_real_nodes_all_must_take_part_unless_fewer_are_asked_for(
    fewer: tuple[str, ...], nodes: dict[int, dict[str, Any]], tiny_bert: Path, tiny_csv: Path
) -> None:
    lost, dropout = lacking({"train.shares": ["client-1"]}), "federation.secure_dropout=0.34"
    if fewer:
        federation = run(tiny_bert, tiny_csv, nodes, *SECURE, dropout, *fewer, app=lost)
        assert sorted(federation.records[1].clients) == ["client-0", "client-2"]
        return
    with pytest.raises(RunError, match=r"round 1: 2 of 3 clients exchanged keys, federation\.min_replies=3 \(not client-1\)"):
        run(tiny_bert, tiny_csv, nodes, *SECURE, dropout, app=lost)
