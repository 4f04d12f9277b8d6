"""Who takes part in the tables of language models, on which data, and one run of them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedsb.run.folder import read_run

GSM8K = Path("../shared/data/gsm8k").resolve()
SEEDS = (0, 1)
# Who takes part, by what it overrides. All start from the same base and see the same 1,600 examples.
CONTESTANTS: Mapping[str, tuple[str, ...]] = {
    "fed_sb": ("method=fed_sb",),
    "fedex_lora": ("method=fedex_lora",),
    "fedavg_lora": ("method=fedavg_lora",),
    "one client with all": ("method=fedavg_lora", "federation.num_clients=1"),
    "flora": ("method=flora",),
    "ffa_lora": ("method=ffa_lora",),
    "flexlora": ("method=flexlora",),
    "rolora": ("method=rolora",),
    "fedsvd": ("method=fedsvd",),
    "fedex_lora, merged": ("method=fedex_lora", "frozen.hold=merge"),
}
SHARED = ("model.dtype=bfloat16", "eval.every=2", "plots=false")


@dataclass(frozen=True)
class Table:
    """One data set.

    Attributes:
        overrides: of all of its runs.
        needs: a folder without which it is passed over.
        gains: nats by which a contestant's loss must be below the untouched base's.
    """

    overrides: tuple[str, ...]
    needs: Path | None = None
    gains: Mapping[str, float] = field(default_factory=dict)


TABLES: Mapping[str, Table] = {
    "gsm8k": Table(
        (
            "experiment=gsm8k_small", "eval.max_examples=200",
            f"data.path={GSM8K / 'train.jsonl'}", f"data.test_path={GSM8K / 'test.jsonl'}",
        ),
        needs=GSM8K,
        gains={"fed_sb": 0.15, "fedex_lora": 0.15},
    ),
    "sums": Table(("experiment=sums_small",)),
}  # fmt: skip


def cell(contestant: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return f"{contestant.replace(', ', '-').replace(' ', '-')}-s{seed}"


def finished(folder: Path) -> bool:
    """Tell whether a run came to its end."""
    return (folder / "summary.json").exists()


def lost(folder: Path) -> str:
    """Say which replies a run went on without: it trained on less than the others, and is no cell; nothing where it has none."""
    records = read_run(folder).records if (folder / "metrics.jsonl").exists() else ()
    failed = [f"round {record.round} had no reply of {name} ({why})" for record in records for name, why in record.failed.items()]
    return f"{failed[0]}{f', and {len(failed) - 1} more' if failed[1:] else ''}" if failed else ""


def fill(folder: Path, overrides: Sequence[str]) -> None:
    """Run a cell, or take it up where it was ended; one that is finished, or that another process is at, is left alone.

    One that lost replies is moved out of the way and run again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if why := lost(folder):
            print(f"{folder.name}: no cell, {why}; it is run again", flush=True)
            fresh(folder)
        if finished(folder):
            return
        begun = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir())
        how = [f"resume={folder}"] if begun else [*overrides, f"output={fresh(folder)}"]
        print(f"{folder.name}: {'goes on' if begun else 'begins'}", flush=True)
        with open(folder.with_suffix(".log"), "a") as log:
            environment = {"OMP_NUM_THREADS": "1", **os.environ}
            done = subprocess.run([sys.executable, "-m", "fedsb.cli", "run", *how], stdout=log, stderr=log, env=environment)
        if done.returncode:
            print(f"{folder.name}: ended with status {done.returncode}, see {log.name}", flush=True)


def fresh(folder: Path) -> Path:
    """Move what a run left that cannot go on, or lost replies, out of the way."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.ended-{time.time_ns()}"))
    return folder
