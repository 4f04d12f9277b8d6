"""What is to be run, in which order, and the file that keeps what has been."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from .cells import Cell, Job, asks, final
from .contestants import CONTESTANTS, DATA, SHARED, TUNING, TUNING_SEEDS
from .ranks import rank_at
from .texts import write


class Cache:
    """What is kept, in one file: ``ranks`` by data, budget and contestant, and ``cells`` by these and the rate or the seed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.ranks: dict[str, int | None] = found.get("ranks", {})
        self.cells: dict[str, Cell] = found.get("cells", {})

    def note(self, job: Job, cell: Cell) -> None:
        """Take in a cell, with what it was asked for."""
        self.cells[job.key] = {**cell, "asks": job.asks}

    def has(self, job: Job) -> bool:
        """Tell whether a job's cell is there, and of a run that asked for the same."""
        return self.cells.get(job.key, {}).get("asks") == job.asks

    def known(self, job: Job) -> Cell | None:
        """Return the cell of another job that asked for the same; a method's rank may be one at two budgets."""
        return next((cell for cell in self.cells.values() if cell.get("asks") == job.asks), None)

    def keep(self) -> None:
        """Write the file, whole or not at all."""
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        draft.write_text(json.dumps({"ranks": self.ranks, "cells": dict(sorted(self.cells.items()))}, indent=1) + "\n")
        draft.replace(self._path)


def has(name: str, budget: str) -> bool:
    """Tell whether a contestant takes part at a budget."""
    return budget in CONTESTANTS[name].budgets


def choose_rank(cache: Cache, folder: Path, data: str, budget: str, name: str) -> None:
    """Note the rank of a contestant."""
    key = f"{data}/{budget}/{name}"
    if key not in cache.ranks:
        rows, _ = write(data, folder / "data")
        cache.ranks[key] = rank_at(budget, CONTESTANTS[name], [*SHARED, *DATA[data], f"data.path={rows}"])
        print(f"{key}: rank {cache.ranks[key]}", flush=True)
        cache.keep()


def jobs_of(cache: Cache, folder: Path, data: str, budget: str, name: str, seed: int | None) -> Iterator[Job]:
    """Yield the runs of a contestant that are not kept: one a rate of the grid on the validation part, or that of a seed."""
    key, contestant, (rows, validation) = f"{data}/{budget}/{name}", CONTESTANTS[name], write(data, folder / "data")
    rank, rate = cache.ranks[key], chosen(cache.cells, key, contestant.rates)
    given = [*contestant.overrides, *contestant.at.get(budget, ()), *SHARED, *DATA[data], f"data.path={rows}"]
    given += [f"rank={rank}"] if rank is not None else []
    tuned = [
        (f"{key}/rate {lr:g}/seed {own}", f"train.lr={lr}", f"seed={own}", *TUNING, f"data.test_path={validation}")
        for own in TUNING_SEEDS
        for lr in contestant.rates
    ]
    final = [(f"{key}/seed {seed}", *([f"train.lr={rate}"] if rate is not None else []), f"seed={seed}")]
    for own, *more in tuned if seed is None else final:
        job = job_of(own, (*given, *more), folder.resolve())
        if not cache.has(job) and (twin := cache.known(job)):
            cache.note(job, twin)
            cache.keep()
        if not cache.has(job):
            yield job


def job_of(key: str, overrides: tuple[str, ...], folder: Path) -> Job:
    """Return a job whose folder tells it from one of the same name that asked for something else."""
    plain = key.replace(", ", "-").replace(" ", "-").replace("'", "")
    return Job(key, overrides, folder / f"{plain}-{asks(overrides)}")


def chosen(cells: Mapping[str, Any], key: str, rates: tuple[float, ...]) -> float | None:
    """Return the rate with the least mean loss on the validation part, over its seeds; None where there is none to choose."""
    losses = {lr: fmean(final(cells.get(f"{key}/rate {lr:g}/seed {seed}", {}), "loss") for seed in TUNING_SEEDS) for lr in rates}
    return min(losses, key=lambda lr: losses[lr]) if losses else None  # the smallest, where none held
