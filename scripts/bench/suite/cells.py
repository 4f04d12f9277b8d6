"""One run of the comparison, what is kept of it, and a run's folder made of that again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedsb.commands.run import run
from fedsb.run.folder import Run, read_run
from fedsb.run.predictions import Predictions, read_predictions, write_predictions
from fedsb.run.records import RoundRecord

Cell = Mapping[str, Any]
KEPT = ("accuracy", "loss")
AT_CLIENTS = ("accuracy", "shared_accuracy", "loss", "shared_loss")
PAYLOADS = ("payload_up", "payload_down", "payload_one_off")
TRUTHS = "truths"  # of a new cell: the classes of its test items, which all cells of a data set and seed share
VERSIONS = ("fedsb", "python", "torch", "transformers", "flwr", "numpy")
SETTINGS = ("method.name", "method.setting", "rank", "train.lr", "seed")
FACTS = ("method", "rank", "trained_params", "payload_total", "exactness_gap", "wall_s")


@dataclass(frozen=True)
class Job:
    """One run: where its cell is kept, its overrides, and its folder."""

    key: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def asks(self) -> str:
        """What is asked for, short: two jobs that ask for the same are one run."""
        return asks(self.overrides)


def asks(overrides: Sequence[str]) -> str:
    """Return what overrides ask for, short: of files their names and what is in them, and not where they lie."""
    files = files_of(overrides)
    bare = [f"{text.partition('=')[0]}={path.name} {digest(path)}" if (path := files.get(text)) else text for text in overrides]
    return hashlib.sha256("\n".join(bare).encode()).hexdigest()[:16]


def files_of(overrides: Sequence[str]) -> dict[str, Path]:
    """Return the files that overrides name, by these."""
    named = {text: Path(value.strip("'")) for text in overrides for key, _, value in [text.partition("=")] if key.endswith("path")}
    return {text: path for text, path in named.items() if path.is_file()}


@cache
def digest(path: Path) -> str:
    """Return the first half of the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@cache
def commit() -> str:
    """Return the commit that is checked out here; empty outside of a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def fill(job: Job) -> tuple[str, Cell]:
    """Run a job, go on with it, or read what it left, and return its key and cell."""
    if not (job.folder / "summary.json").exists():
        begun = (job.folder / "checkpoints").is_dir() and any((job.folder / "checkpoints").iterdir())
        if job.folder.exists() and not begun:
            shutil.rmtree(job.folder)
        how = [f"resume='{job.folder}'"] if begun else [*job.overrides, f"output='{job.folder}'"]
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(job.folder.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            status = run(how)
        if status > 1:
            raise RuntimeError(f"{job.key} was ended, or asked for something else, with status {status}: see {job.folder}.log")
        if status:
            return job.key, {"failed": job.folder.with_suffix(".log").read_text().strip().splitlines()[-1][:200]}
    cell = cell_of(read_run(job.folder))
    cell["made"] |= {"commit": commit(), "data": {path.name: digest(path) for path in files_of(job.overrides).values()}}
    for part in ("checkpoints", "adapter"):  # what is compared is in the cell; the records stay
        shutil.rmtree(job.folder / part, ignore_errors=True)
    return job.key, cell


def cell_of(found: Run) -> dict[str, Any]:
    """Return what is kept of a run: settings, measures and bytes by round, and which test items its model had right, as bits in hex."""
    end, last, predictions = found.summary or {}, found.records[-1], read_predictions(found.path)
    rounds = [
        [r.round, *(getattr(r, key) for key in PAYLOADS), *(round(r.metrics[key], 6) if key in r.metrics else None for key in KEPT)]
        for r in found.records
    ]
    cell = {
        "settings": {key: found.setting(key) for key in SETTINGS},
        "facts": {key: end.get(key) for key in FACTS},
        "measured_by": last.measured_by,
        "rounds": rounds,
        "gaps": [r.exactness_gap and float(f"{r.exactness_gap:.4g}") for r in found.records],
        "gauges": [g and float(f"{g:.4g}") for r in found.records for g in [r.extras.get("gauge")]],
        "extras": {key: float(f"{value:.6g}") for key, value in last.extras.items()},
        "clients": {name: {key: round(row[key], 6) for key in AT_CLIENTS if key in row} for name, row in last.client_metrics.items()},
        "held_out": dict(last.held_out),
        "cpu_s": round(end["cpu_s"], 1),
        "made": {"versions": {name: end["versions"][name] for name in VERSIONS}},
    }
    if predictions is not None:
        right = predictions.columns["accuracy"] > 0.5
        cell |= {"items": predictions.items, "tested": len(right), "right": np.packbits(right).tobytes().hex()}
        cell[TRUTHS] = {predictions.items: "".join(map(str, predictions.columns["truth"]))}
    return cell


def final(cell: Cell, metric: str) -> float:
    """Return the last value of a metric; infinity where the run failed, or has none that is finite."""
    values = [row[1 + len(PAYLOADS) + KEPT.index(metric)] for row in cell.get("rounds", ())]
    return float(values[-1]) if values and values[-1] is not None and math.isfinite(values[-1]) else float("inf")


def unpack(cell: Cell, name: str, folder: Path, truths: Mapping[str, str] | None = None) -> None:
    """Make the folder of a run out of its cell again, as far as a comparison reads it; its method is called ``name``."""
    folder.mkdir(parents=True)
    settings: dict[str, Any] = {}
    for key, value in {**cell["settings"], "method.name": name}.items():
        *groups, own = key.split(".")
        place = settings
        for group in groups:
            place = place.setdefault(group, {})
        place[own] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    records = [_record(i, cell) for i in range(len(cell["rounds"]))]
    (folder / "summary.json").write_text(json.dumps({**cell["facts"], "method": name, "metrics": records[-1].metrics}))
    (folder / "metrics.jsonl").write_text("".join(f"{record.to_json()}\n" for record in records))
    if "right" in cell:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(cell["right"]), np.uint8))[: cell["tested"]]
        columns = {"accuracy": bits.astype(np.float32)}
        if cell["items"] in (truths or {}):
            columns["truth"] = np.array([*map(int, (truths or {})[cell["items"]])], np.int64)
        write_predictions(folder, Predictions(records[-1].round, cell["items"], columns))


def _record(i: int, cell: Cell) -> RoundRecord:
    row, last = cell["rounds"][i], i == len(cell["rounds"]) - 1
    payloads, metrics = row[1 : 1 + len(PAYLOADS)], row[1 + len(PAYLOADS) :]
    return RoundRecord(
        round=row[0],
        **dict(zip(PAYLOADS, payloads, strict=True)),
        metrics={key: value for key, value in zip(KEPT, metrics, strict=True) if value is not None},
        measured_by=cell["measured_by"],
        client_metrics=cell["clients"] if last else {},
        held_out=cell["held_out"] if last else {},
        exactness_gap=cell["gaps"][i],
        extras=cell["extras"] if last else {},
    )
