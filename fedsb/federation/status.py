"""How a side of a federation stands, told from its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedsb.core.errors import UserError
from fedsb.federation.certificates import LINK
from fedsb.federation.held import running
from fedsb.federation.link import NAME, Link
from fedsb.federation.member import KEY
from fedsb.federation.registry import known_keys
from fedsb.runtime.connection import Connection

RUNS = 10  # that are shown, the last ones


def status_of(folder: Path) -> Iterator[str]:
    """Yield lines on what runs from a folder, of a server or a node.

    Raises:
        UserError: it is neither's.
        FlowerError: a SuperLink that should answer does not.
    """
    server = (folder / f"{LINK}.key").is_file()
    if not server and not (folder / KEY).is_file():
        raise UserError(f"'{folder}' is neither a server's folder, which 'fedsb federation init' makes, nor a node's, with '{KEY}'")
    process = running(folder)
    yield f"{'server' if server else 'node'}: {'does not run' if process is None else f'process {process.pid}'}"
    if server and process is not None:
        yield from _link(Link(folder))
    elif not server and process is not None:
        for child in process.children():
            yield f"{'worker' if 'worker' in child.cmdline() else 'SuperNode'}: process {child.pid}"


def _link(link: Link) -> Iterator[str]:
    flower = Connection(NAME, environment=link.environment(), folder=link.folder)
    named = {str(known.number): known.name for known in known_keys(link.database).values()}
    nodes = [node for node in flower.flwr("supernode", "list", NAME)["nodes"] if node["status"] != "unregistered"]
    for node in sorted(nodes, key=lambda node: named.get(node["node-id"], "")):
        yield f"node {named.get(node['node-id']) or node['node-id'] + ', without a name'}: {node['status']}"
    for run in sorted(flower.flwr("list", NAME)["runs"], key=lambda run: str(run["pending-at"]))[-RUNS:]:
        yield f"run {run['run-id']}: {run['status']}"
