"""Real workers for tests, each a process of its own, and federations whose nodes are relays to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

import psutil
import yaml
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedsb.client_app import app
from fedsb.privacy.codes import CODES
from fedsb.resident.place import WORKER
from fedsb.wire.messages import Reply, decode_reply
from tests.flower.harness import eventually
from tests.strategies.federations import KeepingGrid, federate, split_nodes

TWO = ["federation.num_clients=2", "federation.partition.sizes=null", "federation.partition.kind=iid", "train.local_steps=2"]
PRIVATE = ["privacy=example", "privacy.noise_multiplier=1", "init.kind=weight_svd"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Hand:
    """A worker at work: its process (with ``--supervise`` that of its supervisor), its folder, and what it has said."""

    process: subprocess.Popen[str]
    place: Path
    home: Path
    log: Path

    @property
    def pid(self) -> int:
        """The process that answers."""
        children = psutil.Process(self.process.pid).children()
        return children[0].pid if children else self.process.pid

    @property
    def node_config(self) -> dict[str, Any]:
        return {WORKER: str(self.place)}

    @property
    def node_log(self) -> str:
        path = self.home / "node.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""


@contextmanager
def worker(folder: Path, said: dict[str, Any], *flags: str, wait: bool = True) -> Iterator[Hand]:
    """Start a worker of what an operator says; end it behind the block."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "node.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    place, home, log = folder / "w", folder / "home", folder / "out.log"
    environment = {**os.environ, "FEDSB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fedsb.cli", "worker", "--node", str(folder / "node.yaml"), "--at", str(place), *flags]
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, text=True)
    hand = Hand(process, place, home, log)
    try:
        if wait:
            assert eventually(lambda: "fedsb worker of" in log.read_text() or process.poll() is not None, 60), log.read_text()
            assert process.poll() is None, log.read_text()
        yield hand
    finally:
        process.terminate()
        process.wait(30)


def relayed(overrides: Sequence[str], hands: dict[int, Hand], **more: Any) -> Any:
    """Run a federation whose nodes have workers."""

    def grid(app: Any, run_config: dict[str, Any]) -> KeepingGrid:
        return KeepingGrid(app, run_config, {node: hand.node_config for node, hand in hands.items()})

    return federate(overrides, grid=grid, **more)


def dealt(folder: Path, overrides: Sequence[str], clients: int) -> dict[str, Path]:
    """Deal a federation's data out to one folder a client."""
    return {config["client"]: Path(config["data-path"]) for config in split_nodes(folder, list(overrides), clients).values()}


def ask(hand: Hand, overrides: list[str], kind: str = "query.describe", **told: Any) -> Reply:
    """Return what a node's worker answers to one message."""
    config = {"client": "client-1", "round": 1, "clients": "[]", "stage": "", "frozen": "", "layout": 0, **told}
    labels = config.pop("labels", ["film", "sport", "trade"])
    records = {"arrays": ArrayRecord(), "config": ConfigRecord({**config, "labels": json.dumps(labels)})}
    message = Message(RecordDict(records), 1, kind)  # type: ignore[arg-type]
    message.metadata.__dict__["_message_id"] = "asked"
    reply = app(message, Context(7, 1, hand.node_config, RecordDict(), {"overrides": join(overrides)})).content
    counts = reply.metric_records["metrics"].get("num-examples")
    return Reply({}, 0, sum(counts), {}) if isinstance(counts, list) else decode_reply(reply)


def code(name: str) -> int:
    return CODES[name].number
