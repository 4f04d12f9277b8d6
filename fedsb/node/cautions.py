"""What an operator may not have meant: said where a node is checked and where its worker begins, and no reason to refuse."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsb.node.settings import NodeConfig

FOREIGN = 0o077  # what the group and others may do with a file


def cautions(node: NodeConfig) -> Iterator[str]:
    """Yield a line on each thing."""
    secure = node.secure
    if secure.required and not secure.peers:
        yield (
            "secure.required without secure.peers: a server that serves clients of its own making can take all places but this one, "
            "and sees this node's part; name the others' keys in secure.peers"
        )
    if secure.required and not secure.min_clients:
        yield "secure.required without secure.min_clients: a sum over two clients tells each the other's part; say how many must be in it"
    if secure.key and (line := exposed(Path(secure.key))):
        yield f"secure.key: {line}"


def exposed(key: Path) -> str:
    """Say of a private key that others than its user can get at it; empty where they can't, or where it is not there."""
    mode = key.stat().st_mode & 0o777 if key.exists() else 0
    return f"'{key}' is open to others than its user (mode {mode:04o}): chmod 600 '{key}'" if mode & FOREIGN else ""
