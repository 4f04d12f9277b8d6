"""Which node may serve which client: the one whose key was registered under that name, or was seen first under it.

With TLS and node authentication the SuperLink knows a node by its public key, and by the name under which its own operator registered
that key (``flwr supernode register KEY --name CLIENT``). What a node says of itself is a claim; these two are not.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from flwr.serverapp import Grid

from fedsb.core.disk import create_whole
from fedsb.core.errors import RunError
from fedsb.core.public_keys import KEYS_OF_SERVER, normal_form

PLAIN = re.compile(r"[\w.@ -]{1,100}")  # a client's name that can be a file's


class Keys:
    """The nodes' public keys and names, and what is bound to them.

    Args:
        folder: a public key ``CLIENT.pub`` for each client, in OpenSSH's form or as PEM; that of a client without one is written at first
            sight. None: the names of registered keys alone count.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._names: dict[int, str] = {}
        self._keys: dict[int, bytes] = {}

    def see(self, grid: Grid) -> set[int]:
        """Return who is online, and note names and keys."""
        nodes = list(grid.get_nodes())
        self._names |= {node.node_id: node.name for node in nodes if node.name}
        self._keys |= {node.node_id: node.public_key for node in nodes if node.public_key}
        return {node.node_id for node in nodes}

    def wrong(self, node: int, client: str) -> str:
        """Say why a node may not serve a client; nothing where it may, and then it is bound to it.

        Raises:
            RunError: the folder of keys can't be read or written, or holds what is no key.
        """
        name = self._names.get(node)
        if name not in (None, client):
            return f"names '{client}', and its key is registered as '{name}'"
        if self._folder is None:
            return ""
        if node not in self._keys:
            return f"names '{client}', and shows no key; federation.node_keys needs a SuperLink with --enable-supernode-auth"
        return self._against(self._folder, client, self._keys[node])

    def _against(self, folder: Path, client: str, shown: bytes) -> str:
        if not PLAIN.fullmatch(client) or client.startswith("."):
            return f"names '{client}', for which federation.node_keys can have no file"
        path = folder / f"{client}.pub"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            bound_already = [other.name for other in folder.glob("*.pub") if other != path and _holds(other, normal_form(shown))]
            if bound_already:
                return f"names '{client}', and its key is {bound_already[0]} in federation.node_keys; one key serves one client"
            with suppress(FileExistsError):
                create_whole(path, shown.decode("ascii"))
            known = path.read_bytes()
        except OSError as error:
            raise RunError(f"'{path}', where federation.node_keys binds a client to its key: {error.strerror}") from None
        try:
            bound = normal_form(known)
        except ValueError:
            raise RunError(f"'{path}' is no public key; put the node's there, or remove the file") from None
        return "" if bound == normal_form(shown) else f"names '{client}' under another key than {path.name} in federation.node_keys"


def _holds(path: Path, key: bytes) -> bool:
    with suppress(OSError, ValueError):
        return normal_form(path.read_bytes()) == key
    return False


def keys_folder(said: str | None) -> Path | None:
    """Return the folder of keys that a run names, or that of the server on which it runs; None: there is none."""
    found = said or os.environ.get(KEYS_OF_SERVER)
    return Path(found) if found else None
