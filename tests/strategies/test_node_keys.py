"""A client's place is its key's: registered under its name, or seen first under it where keys are kept; another gets no work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.node_pb2 import NodeInfo

from fedsb.core.errors import RunError
from strategies.keys import Keys
from tests.strategies.federations import Federation, classification, federate
from tests.strategies.nodes import ALWAYS, TWO, Nodes, site, told
from tests.strategies.rounds import FEWER

KEYS = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(3)]
PEM = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in KEYS]
OPENSSH = [key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) for key in KEYS]


class Known(Nodes):
    """Nodes that a SuperLink knows by key and, perhaps, by name."""

    info: dict[int, dict[str, Any]]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, **self.info.get(node, {})) for node in self.get_node_ids()]


def run(bert: Path, table: Path, tables: dict[int, Path], info: dict[int, dict[str, Any]], *more: str) -> Federation:
    """Run with nodes 1 and 2, which name client-0 and client-1."""
    nodes = {number: (site(f"client-{number - 1}", tables[20]), ALWAYS) for number in (1, 2)}

    def grid(app: Any, run_config: dict[str, Any]) -> Known:
        made = Known(app, run_config, nodes)
        made.info = info
        return made

    overrides = [*classification(bert, table), *TWO, "init.kind=weight_svd", "federation.num_rounds=1", *more]
    return federate(overrides, grid=grid)


def test_a_name_under_a_key_that_is_registered_under_another_gets_no_work(tiny_bert, tiny_csv, tables, caplog) -> None:
    info = {1: {"name": "client-0"}, 2: {"name": "client-7"}}
    with pytest.raises(RunError, match=r"node 2 names 'client-1', and its key is registered as 'client-7'$"):
        run(tiny_bert, tiny_csv, tables, info)
    assert any("this node gets no work: it names 'client-1', and its key is registered as 'client-7'" in line for line in told(caplog))
    alone = run(tiny_bert, tiny_csv, tables, info, FEWER)
    assert {exchange.node for exchange in alone.grid.exchanges} == {1}


def test_keys_are_bound_at_first_sight_and_hold_in_later_runs(tiny_bert, tiny_csv, tables, tmp_path) -> None:
    info = {number: {"public_key": PEM[number - 1]} for number in (1, 2)}
    keep = f"federation.node_keys={tmp_path / 'keys'}"
    run(tiny_bert, tiny_csv, tables, info, keep)
    assert {path.name: path.read_bytes() for path in (tmp_path / "keys").iterdir()} == {"client-0.pub": PEM[0], "client-1.pub": PEM[1]}
    (tmp_path / "keys" / "client-0.pub").write_bytes(OPENSSH[0])
    run(tiny_bert, tiny_csv, tables, info, keep)
    info[2]["public_key"] = PEM[2]
    with pytest.raises(RunError, match=r"node 2 names 'client-1' under another key than client-1.pub in federation.node_keys$"):
        run(tiny_bert, tiny_csv, tables, info, keep)
    alone = run(tiny_bert, tiny_csv, tables, info, keep, FEWER)
    assert {exchange.node for exchange in alone.grid.exchanges} == {1}


def test_a_node_without_a_key_gets_no_work_where_keys_are_kept(tiny_bert, tiny_csv, tables, tmp_path) -> None:
    with pytest.raises(RunError, match=r"node 1 names 'client-0', and shows no key; federation.node_keys needs a SuperLink with"):
        run(tiny_bert, tiny_csv, tables, {}, f"federation.node_keys={tmp_path}")


def known(folder: Path) -> Keys:
    """Return keys that have seen node 1 with a key of its own."""
    keys = Keys(folder)
    keys.see(type("Seen", (), {"get_nodes": lambda self: [NodeInfo(node_id=1, public_key=PEM[0])]})())
    return keys


@pytest.mark.parametrize("client", ["../client-0", "a/b", ".hidden", ""])
def test_a_name_that_can_be_no_file_is_bound_to_nothing(client: str, tmp_path: Path) -> None:
    assert "can have no file" in known(tmp_path / "keys").wrong(1, client)
    assert not list(tmp_path.rglob("*.pub"))


def test_a_file_that_is_no_key_is_named(tmp_path: Path) -> None:
    for content in ("no key\n", "ssh-foo AAAA\n", "ecdsa-sha2-nistp999 AAAA\n"):
        (tmp_path / "client-0.pub").write_text(content)
        with pytest.raises(RunError, match=r"client-0.pub' is no public key; put the node's there, or remove the file$"):
            known(tmp_path).wrong(1, "client-0")
    (tmp_path / "keys").write_text("")
    with pytest.raises(RunError, match=r"where federation.node_keys binds a client to its key"):
        known(tmp_path / "keys").wrong(1, "client-0")


def test_one_key_is_bound_to_one_client(tmp_path: Path) -> None:
    keys = known(tmp_path)
    assert not keys.wrong(1, "client-0")
    assert "its key is client-0.pub in federation.node_keys; one key serves one client" in keys.wrong(1, "client-1")
    assert [path.name for path in tmp_path.iterdir()] == ["client-0.pub"]
