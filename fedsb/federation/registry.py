"""The list of nodes that a server's operator keeps as files, and the same list in the SuperLink."""

from __future__ import annotations

import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from fedsb.core.disk import replace_whole
from fedsb.core.public_keys import normal_form
from fedsb.runtime.connection import Connection, FlowerError

SUFFIX = ".pub"
LOOKS = 10  # in which a key must be missing before it is revoked, which is for good: files are moved, copied, edited
AGAIN_S = 30.0  # from a registration that failed to the next try
GONE = "Node ID not found"  # as Flower says that a node is revoked already
REVOKED = "its key was revoked, which is for good; the node makes a new one (fedsb federation node-key)"
OTHERWISE = "its key is registered already, as '{name}'; one key serves one client, so the node makes a new one for this"


class Known(NamedTuple):
    """A key that the SuperLink knows."""

    number: int
    name: str
    valid: bool


class Registry:
    """Registers the keys that lie in a folder as ``CLIENT.pub``, each under its client's name, and revokes named ones that have gone.

    Args:
        database: of the SuperLink; read, never written.
        keys: the list.
        flower: the connection to the SuperLink.
        say: takes lines for the operator.
    """

    def __init__(self, database: Path, keys: Path, flower: Connection, say: Callable[[str], None]) -> None:
        self._database = database
        self._keys = keys
        self._flower = flower
        self._say = say
        self._told: dict[str, str] = {}
        self._later: dict[str, float] = {}  # when to try a name again
        self._missing: Counter[int] = Counter()  # looks in which a registered key was not in the list

    def look(self) -> None:
        """Make the SuperLink's list that of the folder; what can't be read changes nothing, and is said."""
        try:
            there = self._listed()
            known = self._admitted(there)
        except (OSError, sqlite3.Error) as error:
            self._tell("", f"the list of nodes can't be read: {error}")
            return
        self._told.pop("", None)
        # A file that can't be read now may be written at this moment; it keeps its name's key.
        kept = {(name, key) for name, (key, _) in there.items()}
        named = {key: each for key, each in known.items() if each.valid and each.name}
        gone = {each.number: each for key, each in named.items() if not {(each.name, key), (each.name, b"")} & kept}
        self._missing = Counter({number: self._missing[number] + 1 for number in gone})
        for number in [number for number, looks in self._missing.items() if looks >= LOOKS]:
            self._revoke(gone[number])

    def _admitted(self, there: Mapping[str, tuple[bytes, bytes]]) -> dict[bytes, Known]:
        """Register what is not known, one key after the other for two files may hold the same, and return what is known then."""
        known = known_keys(self._database)
        for name, (key, content) in there.items():
            if key and self._admit(name, key, content, known):
                known = known_keys(self._database)
        return known

    def _listed(self) -> dict[str, tuple[bytes, bytes]]:
        """Return key and content of each file by client; an empty key where there is none yet.

        Raises:
            OSError: the folder can't be read.
        """
        found = {}
        for name in sorted(os.listdir(self._keys)):
            if name.endswith(SUFFIX) and not name.startswith("."):
                content, key, client = b"", b"", name.removesuffix(SUFFIX)
                try:
                    content = (self._keys / name).read_bytes()
                    key = normal_form(content)
                except (OSError, ValueError):
                    self._tell(client, f"no key is in {name} yet")
                found[client] = (key, content)
        return found

    def _admit(self, name: str, key: bytes, content: bytes, known: Mapping[bytes, Known]) -> bool:
        """Register a key where it is not known; tell whether that was done."""
        if (here := known.get(key)) is not None:
            # Of one that was registered by hand, without a name, runs hold the file itself against the key.
            if not here.valid or here.name not in (name, ""):
                self._tell(name, f"node '{name}' is not admitted: {OTHERWISE.format(name=here.name) if here.valid else REVOKED}")
            return False
        return self._later.get(name, 0.0) <= time.monotonic() and self._register(name, content)

    def _register(self, name: str, content: bytes) -> bool:
        copy = self._database.with_name(".admitted.pub")  # the file itself may be another by then
        try:
            replace_whole(copy, content)
            self._flower.flwr("supernode", "register", str(copy), self._flower.name, "--name", name)
        except (FlowerError, OSError) as error:
            self._later[name] = time.monotonic() + AGAIN_S
            self._tell(name, f"node '{name}' is not admitted yet: {error}")
            return False
        finally:
            copy.unlink(missing_ok=True)
        self._told.pop(name, None)
        self._say(f"node '{name}' is registered, by {name}{SUFFIX}")
        return True

    def _revoke(self, node: Known) -> None:
        """Revoke a key; until that is done the node has its place, and it is tried again."""
        try:
            self._flower.flwr("supernode", "unregister", str(node.number), self._flower.name)
        except FlowerError as error:
            if GONE not in str(error):
                self._tell(node.name, f"node '{node.name}' is not revoked yet: {error}")
                return
        self._told.pop(node.name, None)
        self._say(f"node '{node.name}' is revoked")

    def _tell(self, about: str, line: str) -> None:
        if self._told.get(about) != line:
            self._told[about] = line
            self._say(line)


def known_keys(database: Path) -> dict[bytes, Known]:
    """Return the keys that a SuperLink knows, in normal form; of flwr 1.41 and 1.42, whose commands list nodes without their keys.

    Raises:
        sqlite3.Error: it is not there, is locked, or has another form.
    """
    with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
        rows = connection.execute("SELECT node_id, public_key, name, status FROM node").fetchall()
    # Flower keeps its unsigned numbers as signed ones.
    return {normal_form(key): Known(number % 2**64, name or "", status != "unregistered") for number, key, name, status in rows if key}
