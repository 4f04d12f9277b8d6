"""The server's side: a SuperLink over TLS that takes registered keys alone, with its state in a file, and the list of those keys."""

from __future__ import annotations

import json
import socket
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fedsb.core.errors import UserError
from fedsb.core.public_keys import KEYS_OF_SERVER
from fedsb.federation.certificates import CA, LINK
from fedsb.federation.executor import Executor
from fedsb.federation.held import held
from fedsb.federation.reach import check_reach, joined
from fedsb.federation.registry import Registry
from fedsb.runtime.connection import Connection, FlowerError, flower_environment, script
from fedsb.runtime.flower import tail
from fedsb.runtime.processes import ProcessTree, following

HERE, PORT = "127.0.0.1", 18000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAME = "here"  # of the connection in the folder's own Flower configuration
START_S = 90.0
LOOK_S = 1.0  # between two looks at the list of keys


class Link(NamedTuple):
    """What lies in a server's folder.

    Attributes:
        folder: with the certificates that :func:`fedsb.federation.certificates.certify` makes there.
    """

    folder: Path

    @property
    def authority(self) -> Path:
        """The certificate that nodes and submitters need."""
        return self.folder / f"{CA}.crt"

    @property
    def database(self) -> Path:
        """Flower's state: keys, runs, messages under way."""
        return self.folder / "link.db"

    @property
    def nodes(self) -> Path:
        """The list of keys: ``CLIENT.pub`` for each node."""
        return self.folder / "nodes"

    @property
    def log(self) -> Path:
        """What the SuperLink and the processes below it write."""
        return self.folder / "link.log"

    @property
    def home(self) -> Path:
        """Flower's configuration for this SuperLink (``FLWR_HOME``)."""
        return self.folder / "flower"

    def environment(self) -> dict[str, str]:
        """Return that of the SuperLink and of commands which speak to it: outputs lie in the folder, unless FEDSB_HOME says where."""
        own = {"FEDSB_HOME": str(self.folder), **flower_environment(self.home), KEYS_OF_SERVER: str(self.nodes)}
        # Flower's client asks a proxy for this machine too.
        bypass = {name: ",".join([*filter(None, [own.get(name)]), *LOOPBACK]) for name in ("NO_PROXY", "no_proxy")}
        return own | bypass


def serve(folder: Path, host: str, port: int, say: Callable[[str], None]) -> None:
    """Run a SuperLink, and keep its keys those of the list, until a signal comes.

    Args:
        folder: of the server.
        host: address on which it listens.
        port: of it.
        say: takes lines for whoever started it.

    Raises:
        UserError: the folder has no certificates, or a process already.
        FlowerError: the SuperLink does not start, or ends.
    """
    link = Link(folder)
    _check(link, host, port)
    with held(folder):
        link.nodes.mkdir(exist_ok=True)
        address = joined(host, port)
        _connect(link, address)
        tree = ProcessTree(following(_command(link, host, port)), environment=link.environment(), folder=folder, log=link.log)
        try:
            _await(link, address, tree)
            say(f"SuperLink at {host}:{port}; admit nodes by their keys, as {link.nodes}/CLIENT.pub, and give them {link.authority}")
            say(f"fedsb submit {folder} … runs on it")
            if host != HERE:
                say("whoever reaches this port can submit runs and register keys: publish the path of the fleet alone (docs/federation.md)")
            registry = Registry(link.database, link.nodes, Connection(NAME, environment=link.environment(), folder=folder), say)
            executor = Executor(tree)
            while tree.root.poll() is None and not executor.gone():
                registry.look()
                time.sleep(LOOK_S)
            how = "no process starts runs any more" if tree.root.poll() is None else f"it ended with status {tree.root.returncode}"
            raise FlowerError(f"the SuperLink is of no use: {how}; the end of {link.log}:\n{tail(link.log)}")
        finally:
            tree.end()


def _check(link: Link, host: str, port: int) -> None:
    for path in (link.authority, link.folder / f"{LINK}.crt", link.folder / f"{LINK}.key"):
        if not path.is_file():
            raise UserError(f"'{path}' is not there; 'fedsb federation init {link.folder}' makes it")
    if " " in (where := sysconfig.get_path("purelib")):
        raise UserError(f"flwr is installed below '{where}', and its database can't have a space there; install it below another path")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise UserError(f"the SuperLink can't listen on {host}, port {port}: {error.strerror or error}; give --host or --port") from None


def _connect(link: Link, address: str) -> None:
    """Write Flower's configuration for whoever submits runs from the folder."""
    link.home.mkdir(exist_ok=True)
    head = f'[superlink]\ndefault = "{NAME}"\n\n[superlink.{NAME}]\naddress = "{address}"\n'
    authority = json.dumps(str(link.authority), ensure_ascii=False)
    (link.home / "config.toml").write_text(f"{head}root-certificates = {authority}\n", encoding="utf-8")


def _command(link: Link, host: str, port: int) -> list[str]:
    certificate, secret = (str(link.folder / f"{LINK}.{kind}") for kind in ("crt", "key"))
    tls = ["--ssl-ca-certfile", str(link.authority), "--ssl-certfile", certificate, "--ssl-keyfile", secret, "--enable-supernode-auth"]
    place = ["--host", host, "--port", str(port), "--database", str(link.database), "--isolation", "subprocess"]
    return [script("flower-superlink"), *tls, *place]


def _await(link: Link, address: str, tree: ProcessTree) -> None:
    """Wait until the SuperLink answers; where its certificate is not for the address, that is told at once."""
    deadline = time.monotonic() + START_S
    while True:
        if tree.root.poll() is not None or time.monotonic() > deadline:
            raise FlowerError(f"the SuperLink did not start on {address}; the end of {link.log}:\n{tail(link.log)}")
        try:
            check_reach(address, link.authority)
            return
        except FlowerError:
            time.sleep(0.2)
