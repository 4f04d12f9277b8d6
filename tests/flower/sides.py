"""A server and nodes of a federation over TLS for tests, each run from its folder by the project's own command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedsb.federation.certificates import certify, node_key
from fedsb.federation.link import Link
from fedsb.runtime.flower import free_port
from scripts.demo_federation import FEDSB
from tests.flower.harness import ROOT, eventually, submitting

HERE = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
LIMITS = {"max_local_epochs": 100, "max_seconds": 300}


@contextmanager
def side(folder: Path, *arguments: str, within: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run ``fedsb federation``, perhaps by another command, for the length of a block; its lines go to ``out.log`` in its folder."""
    with (folder / "out.log").open("a", encoding="utf-8") as out:
        process = subprocess.Popen([*within, *FEDSB, "federation", *arguments], env=HERE, text=True, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(90)


class Sides:
    """Folders of a server and of nodes, and what is done with them.

    Args:
        folder: for all of them.
        overrides: of the simulation whose data are dealt out.
        host: where the SuperLink listens.
    """

    def __init__(self, folder: Path, overrides: Sequence[str], host: str = "127.0.0.1") -> None:
        self.folder, self.data, self.server, self.host = folder, folder / "data", folder / "server", host
        split = [sys.executable, str(ROOT / "scripts" / "split_data.py"), str(self.data), *overrides]
        subprocess.run(split, check=True, env=HERE)
        certify(self.server, [host])
        (self.server / "nodes").mkdir()
        self.port = str(free_port())
        self.test_part = f"data.test_path={self.data / 'server' / 'test.jsonl'}"

    def node(self, name: str, client: str) -> Path:
        """Do what an operator of a node does, in a folder of its own."""
        folder = self.folder / name
        node_key(folder / "key")
        shutil.copyfile(self.server / "ca.crt", folder / "ca.crt")
        told = {"client": client, "data": {"path": str(self.data / client)}, "device": "cpu", "limits": LIMITS}
        (folder / "node.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
        return folder

    def admit(self, node: Path, client: str) -> Path:
        """Do what the server's operator does with a node's key, and wait until it is done."""
        before = self.said(self.server).count("is registered")
        path = Path(shutil.copyfile(node / "key.pub", self.server / "nodes" / f"{client}.pub"))
        assert eventually(lambda: self.said(self.server).count("is registered") > before, 100), self.said(self.server)
        return path

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[str]]:
        """Run the server's side for the length of a block."""
        before = self.said(self.server).count("SuperLink at")
        with side(self.server, "server", str(self.server), "--host", self.host, "--port", self.port) as process:
            assert eventually(lambda: self.said(self.server).count("SuperLink at") > before, 100), self.said(self.server)
            yield process

    def joining(self, node: Path, within: Sequence[str] = ()) -> AbstractContextManager[subprocess.Popen[str]]:
        """Run a node's side for the length of a block."""
        return side(node, "node", str(node), "--link", f"{self.host}:{self.port}", within=within)

    def knocking(self, node: Path) -> AbstractContextManager[subprocess.Popen[str]]:
        """Run a node's side that does not get as far as to need its worker."""
        return side(node, "node", str(node), "--link", f"127.0.0.1:{self.port}", "--worker", str(node / "none"))

    def submitting(self, name: str, *overrides: str) -> AbstractContextManager[tuple[subprocess.Popen[str], Path]]:
        """Submit a run for the length of a block."""
        return submitting(str(self.server), overrides, environment=Link(self.server).environment(), folder=self.folder / name)

    @staticmethod
    def said(folder: Path) -> str:
        """Return what a side has printed."""
        path = folder / "out.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""


def kill_below(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Kill the process of a name below another, and return all that were below that."""
    below = psutil.Process(process.pid).children(recursive=True)
    next(each for each in below if name in " ".join(each.cmdline())).kill()
    return below


def failures(run: Path) -> list[dict[str, Any]]:
    """Return who failed in each round of a run, by client, as far as it has got."""
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["failed"] for line in metrics.read_text().splitlines()] if metrics.is_file() else []
