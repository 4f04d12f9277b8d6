"""A SuperLink over TLS and its nodes on one machine, each process known, and the CPU time of the nodes' side."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from fedsb.federation.certificates import certify, node_key
from fedsb.federation.link import Link
from fedsb.runtime.connection import Connection, flower_environment, script
from fedsb.runtime.flower import free_port, tail
from fedsb.runtime.processes import ProcessTree

CLIENTS = tuple(f"client-{i}" for i in range(3))
READY_S, LOOK_S = 240.0, 0.2
NAME = "here"  # of the connection that a server's folder has


@dataclass(frozen=True)
class Field:
    """A SuperLink, and where its nodes have their folders."""

    folder: Path
    address: str
    environment: dict[str, str]

    @property
    def connection(self) -> Connection:
        """Over which runs are submitted."""
        return Connection(NAME, environment=self.environment, folder=self.folder)


@contextmanager
def field(folder: Path, home: Path) -> Iterator[Field]:
    """Start a SuperLink that knows a key of each client's; models are laid out in ``home``."""
    server = folder / "server"
    certify(server, [])
    for client in CLIENTS:
        own = folder / client
        own.mkdir()
        public = node_key(own / "key")
        shutil.copyfile(server / "ca.crt", own / "ca.crt")
        (server / "nodes").mkdir(exist_ok=True)
        shutil.copyfile(public, server / "nodes" / f"{client}.pub")
        said = {"client": client, "data": {"path": "package"}, "device": "cpu"}
        (own / "node.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
        models(own / "home", home)
    models(server, home)
    port = free_port()
    command = [sys.executable, "-P", "-m", "fedsb.cli", "federation", "server", str(server), "--port", str(port)]
    tree = ProcessTree(command, environment=Link(server).environment(), folder=server, log=server / "out.log")
    try:
        _await(lambda: (server / "out.log").read_text().count("is registered") == len(CLIENTS), tree, server / "out.log")
        yield Field(folder, f"127.0.0.1:{port}", Link(server).environment())
    finally:
        tree.end()


def models(home: Path, shared: Path) -> None:
    """Let a home of fedsb's have the models that are laid out in another."""
    home.mkdir(exist_ok=True)
    (shared / "models").mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        (home / "models").symlink_to(shared / "models")


@dataclass(frozen=True)
class Nodes:
    """SuperNodes that are online, and their workers."""

    supernodes: Sequence[ProcessTree]
    workers: Sequence[ProcessTree]
    loads: Sequence[Path]

    def cpu_s(self) -> float:
        """CPU seconds of all of them until now, those of processes that have ended included."""
        return sum(map(_tree_cpu, (*self.supernodes, *self.workers)))

    def loaded(self) -> list[int]:
        """Models that each worker has loaded until now."""
        return [len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0 for path in self.loads]


def _tree_cpu(tree: ProcessTree) -> float:
    found = 0.0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(tree.root.pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                found += sum(process.cpu_times()[:4])  # its own, and of children that it has waited for
    return found


@contextmanager
def nodes(ground: Field, *, workers: bool) -> Iterator[Nodes]:
    """Start a SuperNode for each client, with a worker or without."""
    with ExitStack() as stack:
        hands, loads, online = [], [], []
        for client in CLIENTS if workers else ():
            own = ground.folder / client
            loads.append(own / "loads")
            command = [sys.executable, "-P", str(Path(__file__).with_name("counted_worker.py")), str(own / "loads")]
            hands.append(_started(stack, own, "worker", [*command, "--node", str(own / "node.yaml"), "--at", str(own / "w")]))
        for client, hand in zip(CLIENTS, hands, strict=False):
            log = ground.folder / client / "worker.log"
            _await(lambda log=log: "fedsb worker of" in log.read_text(), hand, log)  # type: ignore[misc]
        for client in CLIENTS:
            own = ground.folder / client
            said = f"worker={json.dumps(str(own / 'w'))}" if workers else f"file={json.dumps(str(own / 'node.yaml'))}"
            keys = ["--auth-supernode-private-key", str(own / "key"), "--root-certificates", str(own / "ca.crt")]
            place = ["--superlink", ground.address, "--port", str(free_port()), "--node-config", said]
            online.append(_started(stack, own, "supernode", [script("flower-supernode"), *place, *keys]))
        listed = ground.connection.flwr
        _await(lambda: json.dumps(listed("supernode", "list", NAME)).count('"online"') == len(CLIENTS), online[0], log_of(ground), 2.0)
        yield Nodes(online, hands, loads)


def log_of(ground: Field) -> Path:
    """Return what the first SuperNode has written."""
    return ground.folder / CLIENTS[0] / "supernode.log"


def _started(stack: ExitStack, own: Path, name: str, command: list[str]) -> ProcessTree:
    (own / "flower").mkdir(exist_ok=True)
    environment = {**flower_environment(own / "flower"), "FEDSB_HOME": str(own / "home"), "HF_HUB_OFFLINE": "1"}
    (own / f"{name}.log").unlink(missing_ok=True)
    tree = ProcessTree(command, environment=environment, folder=own, log=own / f"{name}.log")
    stack.callback(tree.end)
    return tree


def _await(true: Callable[[], bool], tree: ProcessTree, log: Path, pause: float = LOOK_S) -> None:
    deadline = time.monotonic() + READY_S
    while not true():
        if tree.root.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"a process did not begin; the end of {log}:\n{tail(log)}")
        time.sleep(pause)
