"""What a report of many runs takes: seconds of ``fedsb report``, the size of its page, and when chromium lets it be used.

Run as ``python scripts/bench/page.py FOLDER [--runs 200] [--rounds 20]``, where FOLDER is that of a finished run whose server measured it.
Its folder is copied under other methods, ranks and seeds, with its rounds repeated and its metrics moved by a little noise, so that every
table, interval and chart has what it has of real runs; nothing is trained. *Usable* is where all handlers of the page are in place, *drawn*
where the last chart is; the best of three loads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from figures import Figure, show

from fedsb.report.series import final_metrics, totals
from fedsb.run.folder import Run, read_run
from fedsb.run.predictions import read_predictions, write_predictions
from strategies import STRATEGIES

RANKS, SEEDS = (4, 8, 16, 32), 5
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")


def main() -> int:
    """Measure and print the figures; 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="where the made runs and their page stay")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        make_runs(read_run(options.folder), place, options.runs, options.rounds)
        found = [show(figure) for figure in measure(place, options.runs)]
    return int(not all(figure.holds for figure in found))


def make_runs(run: Run, place: Path, count: int, rounds: int) -> None:
    """Write the folders of many runs, made of one."""
    points = [(method, rank, seed) for method in STRATEGIES for rank in RANKS for seed in range(SEEDS)]
    for number, (method, rank, seed) in enumerate(points[:count]):
        folder, noise = place / f"method={method}+rank={rank}+seed={seed}", random.Random(number)
        folder.mkdir(parents=True)
        config: dict[str, Any] = {**run.config, "seed": seed, "rank": rank}
        config["method"] = {**run.setting("method"), "name": method}
        config["federation"] = {**run.setting("federation"), "num_rounds": rounds}
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        first, *_, last = run.records
        moved = [
            replace(last, round=i, metrics={k: v + noise.gauss(0, 0.02) for k, v in last.metrics.items()}) for i in range(1, rounds + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(each.to_json() + "\n" for each in (first, *moved)), encoding="utf-8")
        told = {"method": method, "rank": rank, "seed": seed, "rounds": rounds, "rounds_done": rounds, "metrics": final_metrics(moved)}
        (folder / "summary.json").write_text(json.dumps({**(run.summary or {}), **told, **totals([first, *moved])}), encoding="utf-8")
        (folder / "report.md").write_text("as the run wrote it\n", encoding="utf-8")
        if (kept := read_predictions(run.path)) is not None:
            write_predictions(folder, replace(kept, round=rounds, items=f"{kept.items} {seed}"))


def measure(place: Path, runs: int) -> Iterator[Figure]:
    """Report on the runs in a folder, and load the page."""
    begun = time.monotonic()
    command = [sys.executable, "-m", "fedsb.cli", "report", str(place)]
    done = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    yield Figure("runs", float(runs))
    yield Figure("seconds of fedsb report", time.monotonic() - begun, 20.0)
    yield Figure("of these CPU", resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
    page = place / "comparison.html"
    yield Figure("MB of the page", page.stat().st_size / 1e6, 2.0)
    if shutil.which("chromium") and shutil.which("chromedriver"):
        usable, drawn = (min(column) for column in zip(*(loaded(page) for _ in range(3)), strict=True))
        yield Figure("seconds until it can be used", usable, 1.0)
        yield Figure("seconds until all charts are drawn", drawn)


def loaded(page: Path) -> tuple[float, float]:
    """Return seconds from the start of loading a page until it can be used, and until its last chart is drawn."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, "disable-component-update", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            driver.get(page.resolve().as_uri())
            while not (drawn := marked(driver, "drawn")):
                time.sleep(0.05)
            return marked(driver, "interactive") / 1000, drawn / 1000
        finally:
            driver.quit()


def marked(driver: Any, name: str) -> float:
    """Return when a page has set a mark, in milliseconds; 0 where it has not."""
    return float(driver.execute_script("return performance.getEntriesByName(arguments[0])[0]?.startTime || 0", name))


if __name__ == "__main__":
    sys.exit(main())
