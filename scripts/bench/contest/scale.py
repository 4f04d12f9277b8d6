"""Figures beside the contest: overhead a message, memory over the number of clients and of an actor, time to the first gradient."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from figures import Figure
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from contest.contest import LOOK_S, SCRIPTS, pss_mb, tree
from fedsb.app.prepare import prepare
from fedsb.config.compose import load
from fedsb.models.loading import locate
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.pool import PoolSettings, close_pools, pool_for
from fedsb.runtime.ray import RayGrid
from fedsb.wire.arrays import FROZEN, encode_arrays

IDLE = "contest.scale:idle"
TINY = ("method=fed_sb", "rank=4", "init.kind=weight_svd", "device=cpu", "model=pretrained")
SHORT = ("train.local_steps=1", "train.batch_size=1", "train.max_length=16", "federation.partition.kind=iid", "federation.exactness=false")


def idle(message: Message, context: Context) -> Message:
    """Send back what came, as one example's worth."""
    if message.metadata.message_type == "query.describe":
        names = json.loads(str(message.content.config_records["config"]["clients"]))
        told = {
            "config": ConfigRecord({"client": "", "counted": json.dumps(names)}),
            "metrics": MetricRecord({"num-examples": [1] * len(names)}),
        }
        return Message(RecordDict(told), reply_to=message)  # type: ignore[arg-type]
    arrays = ArrayRecord()
    for key, array in message.content.array_records["arrays"].items():
        if key != FROZEN:
            # One by one: the constructor copies, and takes nothing but bytes.
            arrays[key] = array
    metrics = {"num-examples": 1, "layout": message.content.config_records["config"]["layout"], "loss": 0.0, "steps": 0}
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)  # type: ignore[arg-type]


def figures(quick: bool) -> Iterator[Figure]:
    """Measure one after the other."""
    clients = 100 if quick else 1_000
    yield Figure(f"ms a message of a client that does nothing, local, {clients:,} clients", overhead(clients, local_grid), 1.0)
    yield Figure(f"ms a message of a client that does nothing, ray, {clients:,} clients", overhead(clients, ray_grid), 3.0)
    close_pools()
    few, many = (peak_mb([*SHORT, f"federation.num_clients={n}", "federation.num_rounds=2", "init.kind=weight_svd"]) for n in (10, clients))
    yield Figure(f"peak memory at {clients:,} clients over that at 10 (one process, MiniLM, {few:.0f} MB)", many / few, 1.10)
    base, before, after = actor_mb()
    yield Figure(f"an actor's own memory beyond one's without a model, before a step, over the base's {base:.0f} MB", before, 0.15)
    yield Figure("the same after a Fed-SB step", after, 0.15)
    first, second = first_gradients()
    yield Figure("seconds from `fedsb run` to the first gradient of the start", first, 10.0)
    yield Figure("the same on the second job of a sweep", second, 1.0)
    if not quick:
        yield from cross_device()


def overhead(clients: int, grid_of: Callable[[], SimulationGrid]) -> float:
    """Return the wall milliseconds a message, in the median of three rounds that train nothing: strategy, wire, grid and reducer."""
    overrides = [*SHORT, f"federation.num_clients={clients}", "federation.num_rounds=3", "init.kind=weight_svd", "rank=8"]
    prepared = prepare(load(overrides))
    took: list[float] = []
    prepared.strategy.listener = Stopwatch(took)
    prepared.strategy.start(grid_of(), encode_arrays(prepared.initial), num_rounds=3)
    return 1e3 * median(took) / clients


class Stopwatch:
    """Times the rounds."""

    def __init__(self, took: list[float]) -> None:
        self._took = took
        self._begun = 0.0

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Start."""
        self._begun = time.monotonic()

    def reply(self, client: str, ok: bool) -> None:
        """Stop at a client that failed."""
        assert ok, f"{client} failed"

    def end(self, record: Any, state: Any, frozen: Any) -> None:
        """Stop."""
        if record.round:
            self._took.append(time.monotonic() - self._begun)


def local_grid() -> SimulationGrid:
    """Return a grid whose clients do nothing."""
    return LocalGrid.simulation(idle, {"overrides": ""})


def ray_grid() -> SimulationGrid:
    """Return the same over two actors that have started."""
    pool = pool_for(PoolSettings(IDLE, workers=2, cpus=0.5))
    pool.fill()
    while pool.starting:
        pool.came(pool.starting[:1])
    return RayGrid.simulation(pool, {"overrides": ""})


def peak_mb(overrides: Sequence[str]) -> float:
    """Run a federation in a process of its own and return the peak of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FEDSB_HOME": folder}
        command = [sys.executable, "-m", "fedsb.cli", "run", *overrides, f"output={folder}/run"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            peak, over = [0.0], threading.Event()
            watch = threading.Thread(target=_watch, args=(process.pid, peak, over))
            watch.start()
            process.wait()
            over.set()
            watch.join()
        if process.returncode:
            raise RuntimeError(f"{shlex.join(command)} ended with {process.returncode}")
        return peak[0]


def _watch(pid: int, peak: list[float], over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        peak[0] = max(peak[0], sum(pss_mb(process.pid) for process in tree(pid)))


def actor_mb() -> tuple[float, float, float]:
    """Return the base model's MB, and what an actor holds for itself beyond one without a model: before and after a step, as shares."""
    from contest.actors import measure

    return measure()


def first_gradients() -> tuple[float, float]:
    """Return the seconds to the first gradient of the first and of the second job of a sweep."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "FEDSB_HOME": folder}
        command = [sys.executable, "-m", "contest.first_gradient", "run", "-m", "init.step=0.01,0.02", f"hydra.sweep.dir={folder}/sweep"]
        done = subprocess.run(command, env=environment, cwd=SCRIPTS, capture_output=True, text=True, timeout=600)
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"first_gradient_s"')]
    if len(said) < 2:
        raise RuntimeError(done.stderr[-2000:])
    return said[0]["first_gradient_s"], said[1]["first_gradient_s"]


def tiny_model(folder: Path) -> Path:
    """Write a BERT of two layers with random weights, and the demo model's tokeniser."""
    source = locate(load().model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": len(tokenizer)}
    BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def cross_device() -> Iterator[Figure]:
    """Run 10,000 clients, 100 a round, 20 rounds, with a tiny model over made-up texts; memory at the end over that of the first round."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "texts.jsonl"
        topics = {"a": "red green blue", "b": "one two three", "c": "do re mi"}
        texts = [{"text": f"{text} {i % 97}", "label": label} for i in range(4_000) for label, text in topics.items()]
        table.write_text("".join(json.dumps(row) + "\n" for row in texts))
        overrides = [
            *TINY, *SHORT, f"model.name={tiny_model(Path(folder))}", "federation.num_clients=10000",
            "federation.fraction=0.01", "federation.num_rounds=20", "data=files", f"data.path={table}",
            "data.text=text", "data.label=label", "data.test_fraction=0.1",
            f"output={folder}/run", "progress=json",
        ]  # fmt: skip
        begun = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "fedsb.cli", "run", *overrides], env={**os.environ, "FEDSB_HOME": folder}, capture_output=True, text=True
        )
        wall = time.monotonic() - begun
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"round"')]
        rounds = [row for row in rows if row["round"]]
    yield Figure("10,000 clients, 100 a round, 20 rounds, tiny model: seconds", wall)
    yield Figure("  seconds of a round", sum(row["wall_s"] for row in rounds) / len(rounds))
    yield Figure("  memory in the last round over that in the second", rounds[-1]["memory_bytes"] / rounds[1]["memory_bytes"], 1.10)
    yield Figure("  memory in the last round, MB", rounds[-1]["memory_bytes"] / 1e6)
