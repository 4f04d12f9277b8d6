"""One run of the comparison, what is kept of it, and a run's folder made of that again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
PAYLOADS = ("payload_up", "payload_down", "payload_one_off")
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
    """Return what overrides ask for, short: of files their names, which say what is in them, and not where they lie."""
    bare = [f"{key}={Path(value).name}" if key.endswith("path") else text for text in overrides for key, _, value in [text.partition("=")]]
    return hashlib.sha256("\n".join(bare).encode()).hexdigest()[:16]


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
    for part in ("checkpoints", "adapter"):  # what is compared is in the cell; the records stay
        shutil.rmtree(job.folder / part, ignore_errors=True)
    return job.key, cell


def cell_of(found: Run) -> Cell:
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
        "clients": {name: round(row["accuracy"], 6) for name, row in last.client_metrics.items() if "accuracy" in row},
        "gauge": last.extras.get("gauge"),
        "cpu_s": round(end["cpu_s"], 1),
    }
    if predictions is not None:
        right = predictions.columns["accuracy"] > 0.5
        cell |= {"items": predictions.items, "tested": len(right), "right": np.packbits(right).tobytes().hex()}
    return cell


def final(cell: Cell, metric: str) -> float:
    """Return the last value of a metric; infinity where the run failed, or has none that is finite."""
    values = [row[1 + len(PAYLOADS) + KEPT.index(metric)] for row in cell.get("rounds", ())]
    return float(values[-1]) if values and values[-1] is not None and math.isfinite(values[-1]) else float("inf")


def unpack(cell: Cell, name: str, folder: Path) -> None:
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
    (folder / "summary.json").write_text(json.dumps({**cell["facts"], "method": name}))
    records = [_record(row, cell, last=row is cell["rounds"][-1]) for row in cell["rounds"]]
    (folder / "metrics.jsonl").write_text("".join(f"{record.to_json()}\n" for record in records))
    if "right" in cell:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(cell["right"]), np.uint8))[: cell["tested"]]
        write_predictions(folder, Predictions(records[-1].round, cell["items"], {"accuracy": bits.astype(np.float32)}))


def _record(row: list[Any], cell: Cell, *, last: bool) -> RoundRecord:
    payloads, metrics = row[1 : 1 + len(PAYLOADS)], row[1 + len(PAYLOADS) :]
    return RoundRecord(
        round=row[0],
        **dict(zip(PAYLOADS, payloads, strict=True)),
        metrics={key: value for key, value in zip(KEPT, metrics, strict=True) if value is not None},
        measured_by=cell["measured_by"],
        client_metrics={name: {"accuracy": value} for name, value in cell["clients"].items()} if last else {},
        exactness_gap=cell["facts"]["exactness_gap"] if last else None,
        extras={"gauge": cell["gauge"]} if last and cell["gauge"] is not None else {},
    )
