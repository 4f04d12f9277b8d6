"""Whole private federations in this process, over the real ClientApp, with the run's folder, every message, and what was printed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

from flwr.app import Context, Message, RecordDict
from opacus.accountants import RDPAccountant
from rich.console import Console

from fedsb.app.asked import config_of as client_config
from fedsb.app.client_data import client_features
from fedsb.app.outcome import listener_of
from fedsb.app.prepare import Prepared, planned, prepare
from fedsb.app.private_run import opening_lines
from fedsb.app.threads import use_threads
from fedsb.client_app import app as client_app
from fedsb.config.schema import Config
from fedsb.core.errors import RunError
from fedsb.core.state import State, sha256
from fedsb.report.progress import Progress
from fedsb.run.checkpoint import load_checkpoint
from fedsb.run.folder import RunFolder, read_run
from fedsb.run.records import RoundRecord
from fedsb.run.resuming import sealed
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.messages import decode_instruction
from strategies.carried import remember
from tests.conftest import TOPICS
from tests.strategies.federations import ClientCall, KeepingGrid, in_rounds

ORDERS = [1 + x / 20 for x in range(1, 180)] + [*range(10, 64), 80, 128, 256]
Rewrite = Callable[[int, str], str]


def write_table(path: Path, rows: int, text: Rewrite = lambda i, label: " ".join(TOPICS[label][: 2 + i % 5])) -> Path:
    """Write a table of labelled texts; the labels stay the same whatever the texts are."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        labels = sorted(TOPICS)
        writer.writerows((text(i, labels[i % 3]), labels[i % 3]) for i in range(rows))
    return path


def small(model: Path, folder: Path, *more: str, rows: int = 80) -> list[str]:
    """Return the overrides of a federation of four clients with 20 examples each, q = 1/2, where RDP accounts in no time."""
    train, test = folder / "train.csv", folder / "test.csv"
    for path, count in ((train, rows), (test, 12)):
        if not path.exists():
            write_table(path, count)
    return [
        "model=pretrained", f"model.name='{model}'", "data=files", f"data.path='{train}'", f"data.test_path='{test}'", "device=cpu",
        "federation.wait=0", "federation.num_clients=4", "federation.partition.kind=iid", in_rounds(2),
        "train.batch_size=10", "train.local_steps=2", "train.max_length=12", "rank=2", "privacy.accountant=rdp", "plots=false", *more,
    ]  # fmt: skip


EXAMPLE = ("privacy=example", "privacy.noise_multiplier=2")
CLIENT = ("privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform")


@dataclass(frozen=True)
class Finished:
    """A run that is over, or that stopped."""

    config: Config
    prepared: Prepared
    grid: KeepingGrid
    folder: Path
    printed: str
    error: RunError | None
    claim: Any

    @property
    def records(self) -> tuple[RoundRecord, ...]:
        return read_run(self.folder).records

    @property
    def last(self) -> State:
        return load_checkpoint(self.folder / "checkpoints").state

    @property
    def sha256(self) -> str:
        return sha256(self.last, *self.prepared.strategy.frozen.deltas().values())


def run_privately(
    overrides: Sequence[str],
    folder: Path,
    *,
    app: ClientCall = client_app,
    nodes: dict[int, dict[str, Any]] | None = None,
    grid: type[KeepingGrid] = KeepingGrid,
) -> Finished:
    """Run what ``serve`` runs, without its metrics and its report (a second of plots a run), and keep a RunError."""
    config = client_config(join(overrides))
    use_threads(config)
    made = grid(app, {"overrides": join(overrides), "output": str(folder)}, nodes or {1: {"partition-id": 0, "num-partitions": 1}})
    prepared = planned(prepare(config), made)
    out, screen, error = RunFolder(folder), io.StringIO(), None
    out.write_config(sealed(config))
    with Progress(config.federation.num_rounds, Console(file=screen)) as progress:
        listener = listener_of(prepared, out, progress, lambda: remember(prepared.strategy))
        for line in opening_lines(config, prepared.every_plan, prepared.adapted.shapes):
            progress.say(line)
        prepared.strategy.listener = listener
        first = encode_arrays(prepared.initial, config.federation.wire_dtype)
        try:
            rounds = config.federation.num_rounds
            prepared.strategy.start(made, first, num_rounds=rounds, timeout=60.0)
        except RunError as stopped:
            error = stopped
            listener.stopped(prepared.strategy.unfinished())
    return Finished(config, prepared, made, folder, screen.getvalue(), error, listener.claim)


def ledger_lines(folder: Path, who: str) -> list[dict[str, Any]]:
    """Return the charges of a ledger as they lie on the disk."""
    lines = (folder / "ledgers" / who / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def releases(charges: Sequence[dict[str, Any]]) -> list[tuple[float, float, int]]:
    """Return (noise multiplier, sampling rate, steps) of every entry, as Opacus keeps its history."""
    return [(e["noise_multiplier"], e["sampling_rate"], e["steps"]) for charge in charges for e in charge["entries"]]


def rdp_epsilon(history: Sequence[tuple[float, float, int]], delta: float = 1e-5) -> float:
    """Return epsilon by Opacus alone, none of the project's code."""
    if not history:
        return 0.0
    accountant = RDPAccountant()
    accountant.history = list(history)
    # Its series for broken orders is slow at q = 1/2, as the project knows too.
    orders = [order for order in ORDERS if order == int(order)] if any(0.46 < q < 0.54 for _, q, _ in history) else ORDERS
    return float(accountant.get_epsilon(delta, alphas=orders))


@dataclass
class Watch:
    """The ClientApp with every message and reply kept, those of ``describe`` included."""

    app: ClientCall = client_app

    def __post_init__(self) -> None:
        self.seen: list[tuple[Message, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        self.seen.append((message, reply))
        return reply


def asked(message: Message) -> tuple[str, int]:
    """Return the client and the round of an instruction; no client for ``describe``."""
    if message.metadata.message_type.startswith("query."):
        return "", -1
    instruction = decode_instruction(message.content)
    return instruction.client, instruction.round


def breaking(client: str, number: int, app: ClientCall = client_app) -> ClientCall:
    """Return the ClientApp with a client whose rows are broken in one round: it fails after it was charged."""

    def call(message: Message, context: Context) -> Message:
        if asked(message) != (client, number):
            return app(message, context)
        config, labels = client_config(str(context.run_config["overrides"])), decode_instruction(message.content).labels
        rows, _ = client_features(config, client, None, labels)
        kept = [dict(row) for row in rows]
        for row in rows:
            row["target"] = "a patient's diagnosis"
        try:
            return app(message, context)
        finally:
            rows[:] = kept

    return call


def answering(client: str, number: int, content: Callable[[], RecordDict], app: ClientCall = client_app) -> ClientCall:
    """Return the ClientApp with one client's reply of a round replaced, after its work."""

    def call(message: Message, context: Context) -> Message:
        reply = app(message, context)
        return Message(content(), reply_to=message) if asked(message) == (client, number) else reply

    return call


def metrics_of(reply: Message) -> dict[str, Any]:
    """Return the metrics of a reply."""
    return dict(reply.content.metric_records["metrics"])
