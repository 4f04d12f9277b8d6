"""One run of the comparison, and what is kept of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsb.commands.run import run
from fedsb.run.folder import Run, read_run
from fedsb.run.predictions import read_predictions

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One run: where its cell is kept, its overrides, and its folder."""

    key: str
    overrides: tuple[str, ...]
    folder: Path


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
    """Return what is kept of a run: measures, bytes round by round, and which test items its model had right, as bits in hex."""
    end = found.summary or {}
    last, predictions = found.records[-1], read_predictions(found.path)
    moved, rounds = 0, []
    for record in found.records:
        moved += record.payload_up + record.payload_down + record.payload_one_off
        if "accuracy" in record.metrics:
            rounds.append([record.round, round(record.metrics["accuracy"], 6), moved])
    cell = {
        "rank": end["rank"],
        "trained": end["trained_params"],
        "lr": found.setting("train.lr"),
        "metrics": {key: round(value, 6) for key, value in last.metrics.items()},
        "on_clients": {name: row["accuracy"] for name, row in last.client_metrics.items() if "accuracy" in row},
        "rounds": rounds,
        "bytes": {key: end[f"payload_{key}"] for key in ("up", "down", "one_off")},
        "gap": end["exactness_gap"],
        "gauge": last.extras.get("gauge"),
        "cpu_s": round(end["cpu_s"], 1),
    }
    if predictions is not None:
        right = predictions.columns["accuracy"] > 0.5
        cell |= {"items": predictions.items, "tested": len(right), "right": np.packbits(right).tobytes().hex()}
    return cell
