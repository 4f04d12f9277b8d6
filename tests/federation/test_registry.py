"""The SuperLink's list follows the folder's, and what is only being written, moved or edited revokes nobody."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.supercore.state.schema.linkstate_models import LinkStateBase
from sqlalchemy import create_engine

from fedsb.federation import registry
from fedsb.federation.certificates import node_key
from fedsb.federation.registry import LOOKS, Registry
from fedsb.runtime.connection import Connection, FlowerError


class Link(Connection):
    """The two commands on a database of Flower's own form; what a SuperLink does with them, ``test_tls`` runs."""

    def __init__(self, database: Path) -> None:
        super().__init__("here", environment={}, folder=database.parent)
        self.database = database
        self.fails = ""

    def flwr(self, *arguments: str) -> dict[str, Any]:
        if self.fails:
            raise FlowerError(self.fails)
        with closing(sqlite3.connect(self.database)) as connection, connection:
            if arguments[1] == "register":
                key = load_ssh_public_key(Path(arguments[2]).read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                number = 2**63 + connection.execute("SELECT count(*) FROM node").fetchone()[0] - 2**64
                connection.execute(
                    "INSERT INTO node (node_id, public_key, name, status) VALUES (?, ?, ?, 'registered')", (number, key, arguments[5])
                )
            else:
                connection.execute("UPDATE node SET status = 'unregistered' WHERE node_id = ?", (int(arguments[2]) - 2**64,))
        return {}


class House:
    """A server's folder, and what its operator is told."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "nodes"
        self.keys.mkdir()
        self.spare = folder / "spare"
        self.link = Link(folder / "link.db")
        LinkStateBase.metadata.create_all(create_engine(f"sqlite:///{self.link.database}"))
        self.told: list[str] = []
        self.registry = Registry(self.link.database, self.keys, self.link, self.told.append)

    def key(self, name: str) -> Path:
        return node_key(self.spare / name)

    def put(self, client: str, content: bytes) -> None:
        (self.keys / f"{client}.pub").write_bytes(content)

    def look(self, times: int = 1) -> list[str]:
        """Return what is told over some looks."""
        before = len(self.told)
        for _ in range(times):
            self.registry.look()
        return self.told[before:]

    def valid(self) -> dict[str, str]:
        with closing(sqlite3.connect(self.link.database)) as connection:
            return dict(connection.execute("SELECT name, status FROM node").fetchall())


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_key_is_registered_when_it_comes_and_revoked_for_good_when_it_has_been_gone(house: House) -> None:
    key = house.key("one").read_bytes()
    house.put("client-0", key)
    assert house.look(3) == ["node 'client-0' is registered, by client-0.pub"]
    (house.keys / "client-0.pub").unlink()
    assert house.look(LOOKS - 1) == []
    assert house.look(3) == ["node 'client-0' is revoked"]
    house.put("client-0", key)
    assert house.look(3) == [f"node 'client-0' is not admitted: {registry.REVOKED}"]
    house.put("client-0", house.key("two").read_bytes())
    assert house.look(3) == ["node 'client-0' is registered, by client-0.pub"]


def test_what_is_half_written_edited_or_moved_for_a_moment_revokes_nobody(house: House) -> None:
    key = house.key("one").read_bytes()
    for half in (b"", key[:40]):
        house.put("client-0", half)
        house.look(2)
    house.put("client-0", key)
    house.look()
    assert house.valid() == {"client-0": "registered"}
    for content in (key.rstrip() + b" of ward 7\n", b"", key[:30], key):
        house.put("client-0", content)
        house.look(2 * LOOKS)
    house.keys.rename(house.keys.with_name("moved"))
    [line] = house.look(2 * LOOKS)
    assert "the list of nodes can't be read" in line
    house.keys.with_name("moved").rename(house.keys)
    house.look(2 * LOOKS)
    assert house.valid() == {"client-0": "registered"}


def test_another_registry_goes_on_with_what_the_superlink_knows(house: House) -> None:
    house.put("client-0", house.key("one").read_bytes())
    house.look()
    house.registry = Registry(house.link.database, house.keys, house.link, house.told.append)
    assert house.look(3) == []
    (house.keys / "client-0.pub").unlink()
    assert house.look(2 * LOOKS) == ["node 'client-0' is revoked"]


def test_one_key_serves_one_client(house: House) -> None:
    key = house.key("one").read_bytes()
    house.put("client-0", key)
    house.put("client-1", key)
    first, second = house.look(3)
    assert first == "node 'client-0' is registered, by client-0.pub"
    assert second.startswith("node 'client-1' is not admitted: its key is registered already, as 'client-0'")


def test_what_fails_is_tried_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AGAIN_S", 0.0)
    house.put("client-0", house.key("one").read_bytes())
    house.link.fails = "no answer in 30 s"
    assert house.look(3) == ["node 'client-0' is not admitted yet: no answer in 30 s"]
    house.link.fails = ""
    assert house.look(3) == ["node 'client-0' is registered, by client-0.pub"]
    (house.keys / "client-0.pub").unlink()
    house.link.fails = "SuperLink connection 'here' not found"
    assert house.look(2 * LOOKS) == ["node 'client-0' is not revoked yet: SuperLink connection 'here' not found"]
    assert house.valid() == {"client-0": "registered"}
    house.link.fails = ""
    assert house.look(2) == ["node 'client-0' is revoked"]
    assert house.valid() == {"client-0": "unregistered"}
