"""What is to be run, in which order, and the file that keeps what has been."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from .cells import TRUTHS, Cell, Job, asks, final
from .contestants import CONTESTANTS, DATA, FINALISTS, REFERENCE_RANK, SEEDS, SHARED, TUNING, TUNING_SEEDS, Contestant
from .ranks import Found, rank_at
from .texts import write

Asked = tuple[str, ...]  # the end of a cell's key, and its overrides


class Cache:
    """What is kept, in one file, a line an entry.

    ``ranks`` by data, budget and contestant; ``cells`` by these and the rate or the seed; ``truths``, the classes of the test items as
    digits, by the hash of the items. Cells of runs that failed are passed over: they are run again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path.exists() else {}
        self.ranks: dict[str, Any] = found.get("ranks", {})
        self.cells: dict[str, Cell] = {key: cell for key, cell in found.get("cells", {}).items() if "failed" not in cell}
        self.truths: dict[str, str] = found.get("truths", {})

    def note(self, job: Job, cell: Cell) -> None:
        """Take in a cell, with what it was asked for."""
        self.truths |= cell.get(TRUTHS, {})
        self.cells[job.key] = {**{key: value for key, value in cell.items() if key != TRUTHS}, "asks": job.asks}

    def has(self, job: Job) -> bool:
        """Tell whether a job's cell is there, and of a run that asked for the same."""
        return self.cells.get(job.key, {}).get("asks") == job.asks

    def known(self, job: Job) -> Cell | None:
        """Return the cell of another job that asked for the same; a method's rank may be one at two budgets."""
        return next((cell for cell in self.cells.values() if cell.get("asks") == job.asks), None)

    def keep(self) -> None:
        """Write the file, whole or not at all."""
        groups = {"ranks": self.ranks, "truths": self.truths, "cells": self.cells}
        lines = {
            name: ",\n".join(f"{json.dumps(key)}: {json.dumps(group[key])}" for key in sorted(group)) for name, group in groups.items()
        }
        draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        draft.write_text("{" + ",\n".join(f'"{name}": {{\n{text}\n}}' for name, text in lines.items()) + "}\n")
        draft.replace(self._path)


def _lines(group: Mapping[str, Any]) -> str:
    return ",\n".join(f"{json.dumps(key)}: {json.dumps(group[key])}" for key in sorted(group))


def has(name: str, budget: str) -> bool:
    """Tell whether a contestant takes part at a budget."""
    return budget in CONTESTANTS[name].budgets


def choose_rank(cache: Cache, folder: Path, data: str, budget: str, name: str) -> None:
    """Note the rank of a contestant, and how far it is from the budget."""
    key, rows = f"{data}/{budget}/{name}", write(data, folder / "data")[0]
    given = [*CONTESTANTS[name].overrides, *CONTESTANTS[name].at.get(budget, ()), *SHARED, *DATA[data], f"data.path={rows}"]
    given += [f"reference={REFERENCE_RANK}"]
    if cache.ranks.get(key, {}).get("asks") != asks(given):
        found = rank_at(budget, CONTESTANTS[name], [*SHARED, *DATA[data], f"data.path={rows}"])
        cache.ranks[key] = {**asdict(found), "asks": asks(given)}
        cache.keep()
    print(f"{key}: {rank_text(Found(cache.ranks[key]['rank'], cache.ranks[key]['off']))}", flush=True)


def rank_text(found: Found) -> str:
    """Say a rank, and how far it is from the reference's budget."""
    return f"rank {'–' if found.rank is None else found.rank}, {found.off:+.1%} of the reference's budget"


def runs_of(contestant: Contestant) -> int:
    """Return how many runs a contestant takes at a budget."""
    return (len(contestant.rates) + FINALISTS if contestant.rates else 0) + len(SEEDS)


def first_rates(cells: Mapping[str, Any], key: str, contestant: Contestant) -> Iterator[tuple[int, float]]:
    """Yield the seed and the rates of the first runs that choose one: all of them."""
    return ((TUNING_SEEDS[0], lr) for lr in contestant.rates)


def best_rates(cells: Mapping[str, Any], key: str, contestant: Contestant) -> Iterator[tuple[int, float]]:
    """Yield those of the second: the best of the first."""
    return ((TUNING_SEEDS[1], lr) for lr in finalists(cells, key, contestant.rates))


Stage = Callable[[Mapping[str, Any], str, Contestant], Iterator[tuple[int, float]]]
STAGES: Sequence[Stage | int] = (first_rates, best_rates, *SEEDS)


def jobs_of(cache: Cache, folder: Path, data: str, budget: str, name: str, stage: Stage | int) -> Iterator[Job]:
    """Yield the runs of a contestant that are not kept: those that choose its rate on the validation part, or that of a seed."""
    key, contestant, (rows, validation) = f"{data}/{budget}/{name}", CONTESTANTS[name], write(data, folder / "data")
    rank = cache.ranks[key]["rank"]
    given = [*contestant.overrides, *contestant.at.get(budget, ()), *SHARED, *DATA[data], f"data.path={rows}"]
    given += [f"rank={rank}"] if rank is not None else []
    for own, *more in (
        _of_seed(cache, data, budget, name, stage) if isinstance(stage, int) else _tuning(cache, key, name, stage, validation)
    ):
        job = job_of(own, (*given, *more), folder.resolve())
        if not cache.has(job) and (twin := cache.known(job)):
            cache.note(job, twin)
            cache.keep()
        if not cache.has(job):
            yield job


def _tuning(cache: Cache, key: str, name: str, stage: Stage, validation: Path) -> list[Asked]:
    return [
        (rate_key(key, lr, seed), f"train.lr={lr}", f"seed={seed}", *TUNING, f"data.test_path={validation}")
        for seed, lr in stage(cache.cells, key, CONTESTANTS[name])
    ]


def _of_seed(cache: Cache, data: str, budget: str, name: str, seed: int) -> list[Asked]:
    whose = CONTESTANTS[name].rate_of or name
    rate = chosen(cache.cells, f"{data}/{budget}/{whose}", CONTESTANTS[whose].rates)
    return [(f"{data}/{budget}/{name}/seed {seed}", *([f"train.lr={rate}"] if rate is not None else []), f"seed={seed}")]


def job_of(key: str, overrides: tuple[str, ...], folder: Path) -> Job:
    """Return a job whose folder tells it from one of the same name that asked for something else."""
    plain = key.replace(", ", "-").replace(" ", "-").replace("'", "")
    return Job(key, overrides, folder / f"{plain}-{asks(overrides)}")


def rate_key(key: str, lr: float, seed: int) -> str:
    """Return the key of a run that chooses a rate."""
    return f"{key}/rate {lr:g}/seed {seed}"


def finalists(cells: Mapping[str, Any], key: str, rates: Sequence[float]) -> list[float]:
    """Return the rates with the least losses under the first tuning seed; a run that failed has an infinite one."""
    losses = {lr: final(cells.get(rate_key(key, lr, TUNING_SEEDS[0]), {}), "loss") for lr in rates}
    return sorted(rates, key=lambda lr: (losses[lr], lr))[:FINALISTS]


def chosen(cells: Mapping[str, Any], key: str, rates: Sequence[float]) -> float | None:
    """Return the finalist with the least mean loss on the validation part, over the tuning seeds; None where there is none to choose."""
    means = {
        lr: fmean(final(cells.get(rate_key(key, lr, seed), {}), "loss") for seed in TUNING_SEEDS) for lr in finalists(cells, key, rates)
    }
    return min(means, key=lambda lr: (means[lr], lr)) if means else None  # the smaller, where neither held
