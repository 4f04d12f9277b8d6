"""Every method on two data sets at two budgets, rates chosen by one grid: the runs of docs/methods.md, kept one by one.

Run as ``python scripts/bench/methods.py FOLDER [--data bbc] [--budget values] [--cache FILE] [--workers 2] [--minutes M]``. A run takes
about a minute of one core; all of them take hours. What is in the cache is not run again; a script that is ended goes on where it was.
Table by table, first each contestant's rate is chosen on the validation part (the same four for all; the two of least loss under one seed
run with a second, and the least mean is taken), then the seeds are run, the first for all contestants, then the second. Ranks are those at
which a contestant trains as many values as FedIT at rank 8, or moves as many bytes over the whole run, one-off included. A rate at which a
run fails is not chosen; exit status 1 if a run of a seed failed, which the next start runs again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from suite.cells import Cell, Job, fill, final
from suite.contestants import BYTES, CONTESTANTS, DATA, VALUES
from suite.plan import STAGES, Cache, choose_rank, has, jobs_of, runs_of

RECYCLE = 30  # runs of one process


def main() -> int:
    """Run what is missing and say how far it is."""
    options = parse()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    options.folder.mkdir(parents=True, exist_ok=True)
    cache, deadline = Cache(options.cache), time.monotonic() + 60 * options.minutes
    wanted = [(data, budget, name) for data in options.data for budget in options.budget for name in options.only if has(name, budget)]
    for data, budget, name in wanted:
        choose_rank(cache, options.folder, data, budget, name)
    failed: list[str] = []
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), max_tasks_per_child=RECYCLE) as pool:
        for table in dict.fromkeys((data, budget) for data, budget, _ in wanted):  # one after the other, each whole
            own = [(data, budget, name) for data, budget, name in wanted if (data, budget) == table]
            for stage in STAGES:
                jobs = (job for data, budget, name in own for job in jobs_of(cache, options.folder, data, budget, name, stage))
                failed += work(cache, pool, jobs, options.workers, deadline)
    missed = [key for key in failed if "/rate " not in key]
    planned = sum(runs_of(CONTESTANTS[name]) for _, _, name in wanted)
    print(f"{len(cache.cells)} cells are kept; {planned} were asked for; {len(missed)} failed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


def work(cache: Cache, pool: ProcessPoolExecutor, jobs: Iterator[Job], workers: int, deadline: float) -> list[str]:
    """Run jobs side by side, keep each cell as it comes, and return whose run failed; none is begun behind the deadline."""
    running: dict[Future[tuple[str, Cell]], Job] = {}
    failed: list[str] = []
    for job in jobs:
        if time.monotonic() > deadline:
            break
        running[pool.submit(fill, job)] = job
        if len(running) >= workers:
            running = settle(cache, running, failed)
    while running:
        running = settle(cache, running, failed)
    return failed


def settle(cache: Cache, running: dict[Future[tuple[str, Cell]], Job], failed: list[str]) -> dict[Future[tuple[str, Cell]], Job]:
    """Keep the cells of what has ended and return what has not."""
    done, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        key, cell = future.result()
        cache.note(running[future], cell)
        failed += [key] if "failed" in cell else []
        print(f"{key}: {cell.get('failed') or final(cell, 'accuracy')}  {cell.get('cpu_s', 0):.0f} s", flush=True)
    cache.keep()
    return {future: running[future] for future in rest}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    parser.add_argument("--budget", nargs="+", default=[VALUES, BYTES], choices=[VALUES, BYTES])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--cache", type=Path, default=Path("bench_methods.json"), metavar="FILE", help="finished runs")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
