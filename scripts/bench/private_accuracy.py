"""Accuracy under example-level privacy, by method, pooling and epsilon; every method is tuned with the same number of trials.

Run as ``python scripts/bench/private_accuracy.py [--table bbc sst2] [--cache PATH]`` on an installed project (extra `demo`). A run takes
about a minute of CPU time and there are some hundred: finished ones are kept in the cache file, a killed script goes on where it was, two
may share one, and ``--minutes`` stops it in good order. Settings are chosen on a part of the training data that the clients of that trial
do not hold; the test part is looked at by the chosen settings only. The frozen layers below the adapters are computed once a text.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from frozen_prefix import remember_prefix

from fedsb.app.assembly import measured_features, public_features, task_of
from fedsb.app.prepare import planned, prepare
from fedsb.app.private_run import save_plans
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.models.evaluate import evaluate
from fedsb.runtime.local import LocalGrid
from fedsb.wire.arrays import decode_state, encode_arrays

VALIDATION = 0.15
TUNING_SEED = 100
SST2 = Path("../shared/data/sst2")
Grid = list[list[str]]


def low_rank(rank: int, rates: Sequence[float], scales: Sequence[float]) -> Grid:
    """Return the trials of a method with adapters: learning rate by scale s = alpha / r."""
    return [[f"train.lr={rate}", f"adapter.alpha={scale * rank:g}"] for rate in rates for scale in scales]


# Method -> its trials with and without privacy, six each: what noise asks for is too fast without it.
METHODS: dict[str, tuple[Grid, Grid]] = {
    "fed_sb": (low_rank(16, (0.1, 0.2, 0.4), (1, 2)), low_rank(16, (0.02, 0.05, 0.2), (2, 4))),
    "fedavg_lora": (low_rank(8, (0.01, 0.02, 0.05), (1, 4)), low_rank(8, (0.002, 0.005, 0.02), (1, 4))),
    "fedex_lora": (low_rank(8, (0.01, 0.02, 0.05), (1, 4)), low_rank(8, (0.002, 0.005, 0.02), (1, 4))),
    "head_only": (
        [[f"train.lr={rate}", f"privacy.max_grad_norm={norm}"] for rate in (0.05, 0.2, 0.5) for norm in (0.3, 1.0)],
        [[f"train.lr={rate}"] for rate in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)],
    ),
}


def shared(rounds: int, max_length: int) -> tuple[str, ...]:
    """Return what is the same for every method.

    Adapters on the last of six layers only: fewer weights to put noise on, and the rest is computed once. A step and a mean a round: the
    mean over clients takes noise away before an optimiser sees the next gradient.
    """
    return (
        "adapter.targets=[layer.5.*]", "federation.partition.kind=iid", f"federation.num_rounds={rounds}", "train.local_steps=1",
        f"train.max_length={max_length}", "federation.exactness=false",
    )  # fmt: skip


@dataclass(frozen=True)
class Table:
    """One data set.

    Attributes:
        base: overrides of every run.
        epsilons: targets; None trains without privacy.
        delta: δ.
        tuned_at: the target at which settings are chosen for all private columns.
        bounds: least accuracy of fed_sb with the model's own pooling, by epsilon.
    """

    base: tuple[str, ...]
    epsilons: tuple[float | None, ...]
    delta: float
    tuned_at: float = 3.0
    poolings: tuple[str, ...] = ("own", "mean")
    bounds: Mapping[float, float] = field(default_factory=dict)


TABLES: dict[str, Table] = {
    "bbc": Table(
        base=(*shared(20, 48), "federation.num_clients=5", "train.batch_size=80"),
        epsilons=(1.0, 3.0, 8.0, None),
        delta=1e-4,
        bounds={3.0: 0.78, 8.0: 0.88},
    ),
    "sst2": Table(
        base=(
            *shared(30, 32), "federation.num_clients=6", "train.batch_size=80", "data=files", "data.text=text", "data.label=label",
            f"data.path={SST2 / 'train.jsonl'}", f"data.test_path={SST2 / 'test.jsonl'}",
        ),
        epsilons=(3.0, 6.0, None),
        delta=1e-5,
    ),
}  # fmt: skip


def main() -> int:
    """Run what is not in the cache yet, print the tables, and hold fed_sb against its bounds."""
    options = parse()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cache = Cache(options.cache, time.monotonic() + 60 * options.minutes)
    failed = False
    for name in options.table:
        if name == "sst2" and not SST2.is_dir():
            print(f"sst2: skipped, {SST2} is not here")
            continue
        rows = list(table_rows(TABLES[name], options, cache))
        print_table(name, TABLES[name], rows)
        failed |= not bounds_hold(TABLES[name], rows)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", nargs="+", default=["bbc"], choices=sorted(TABLES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--poolings", nargs="+", default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--cache", type=Path, default=Path("bench_private_accuracy.json"), metavar="PATH", help="finished runs")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--tune-only", action="store_true", help="stop after the trials")
    return parser.parse_args()


class Cache:
    """Accuracy by the overrides of a run and the part that it is measured on, in one JSON file; and when to start no more."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._path = path
        self._deadline = deadline
        self._known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def accuracy(self, overrides: Sequence[str], part: str) -> float:
        """Return what is known of a run, or run it; NaN where the time is over."""
        key = f"{part}: {shlex.join(overrides)}"
        if key not in self._known and time.monotonic() < self._deadline:
            begun = time.monotonic()
            self._known[key] = federate(overrides, part)
            # Another process may have added to the file since.
            self._known |= json.loads(self._path.read_text()) if self._path.exists() else {}
            draft = self._path.with_name(f"{self._path.name}.{os.getpid()}")
            draft.write_text(json.dumps(self._known, indent=2) + "\n")
            draft.replace(self._path)
            print(f"{self._known[key]:.3f}  {time.monotonic() - begun:4.0f} s  {key}", flush=True)
        return self._known.get(key, float("nan"))


def federate(overrides: Sequence[str], part: str) -> float:
    """Run a federation in this process and return its final accuracy on the test part, or on the validation part."""
    with tempfile.TemporaryDirectory() as folder:
        config = load(list(overrides))
        grid = LocalGrid.simulation(app, {"overrides": shlex.join(overrides), "output": folder})
        prepared = planned(prepare(config), grid)
        save_plans(Path(folder) / "ledgers", prepared.plans)
        remember_prefix(prepared.adapted)
        first = encode_arrays(prepared.initial)
        result = prepared.strategy.start(grid, first, num_rounds=config.federation.num_rounds, timeout=1e6)
        assert result.arrays is not None
        adapted = prepared.adapted
        adapted.install(decode_state(result.arrays, adapted.layouts.down), prepared.strategy.frozen.view())
        features = measured_features(config) if part == "test" else public_features(config)
        return evaluate(adapted, task_of(config), features, train=config.train)["accuracy"]


@dataclass(frozen=True)
class Row:
    """One method and pooling: the setting chosen with and without privacy, and the accuracies of the seeds by epsilon."""

    method: str
    pooling: str
    chosen: Mapping[bool, list[str]]
    accuracies: Mapping[float | None, list[float]]


def table_rows(table: Table, options: argparse.Namespace, cache: Cache) -> Iterator[Row]:
    """Tune each method, then run the seeds of every column."""
    for pooling in options.poolings or table.poolings:
        for method in options.methods:
            found_best = {private: choose(table, method, pooling, private, cache) for private in (True, False)}
            chosen = {private: setting for private, setting in found_best.items() if setting is not None}
            if options.tune_only or len(chosen) < 2:
                continue
            found = {
                epsilon: [
                    cache.accuracy([*run_of(table, method, pooling, epsilon), f"seed={seed}", *chosen[epsilon is not None]], "test")
                    for seed in options.seeds
                ]
                for epsilon in table.epsilons
            }
            yield Row(method, pooling, chosen, found)


def choose(table: Table, method: str, pooling: str, private: bool, cache: Cache) -> list[str] | None:
    """Return the setting with the best accuracy on the validation part; None while a trial is missing."""
    base = [
        *run_of(table, method, pooling, table.tuned_at if private else None),
        f"seed={TUNING_SEED}",
        f"data.public_fraction={VALIDATION}",
    ]
    trials = METHODS[method][not private]
    scores = [cache.accuracy([*base, *setting], "validation") for setting in trials]
    return trials[scores.index(max(scores))] if all(score == score for score in scores) else None


def run_of(table: Table, method: str, pooling: str, epsilon: float | None) -> list[str]:
    """Return the overrides of a column."""
    start = ["init.kind=weight_svd"] if method == "fed_sb" else []
    privacy = [] if epsilon is None else ["privacy=example", f"privacy.epsilon={epsilon}", f"privacy.delta={table.delta}"]
    return [f"method={method}", f"model.pooling={pooling}", *start, *table.base, *privacy]


def cell(values: Sequence[float], digits: int = 3) -> str:
    """Write mean ± standard error of the seeds that are done."""
    done = [value for value in values if value == value]
    if not done:
        return "–"
    error = f" ± {stdev(done) / len(done) ** 0.5:.{digits}f}" if len(done) > 1 else ""
    return f"{mean(done):.{digits}f}{error}" + (f" ({len(done)} seeds)" if len(done) < len(values) else "")


def print_table(name: str, table: Table, rows: Sequence[Row]) -> None:
    """Print a table in Markdown, its settings and the grids."""
    head = [
        "method",
        "pooling",
        *("no privacy" if e is None else f"epsilon {e:g}" for e in table.epsilons),
        "setting at epsilon",
        "without",
    ]
    print(f"\n{name}: {' '.join(table.base)} privacy.delta={table.delta}\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        settings = [" ".join(o.split(".", 1)[1] for o in row.chosen[private]) for private in (True, False)]
        print("| " + " | ".join([row.method, row.pooling, *(cell(row.accuracies[e]) for e in table.epsilons), *settings]) + " |")
    for method, grids in METHODS.items():
        for what, grid in zip((f"at epsilon {table.tuned_at:g}", "without privacy"), grids, strict=True):
            print(f"\ntrials of {method} {what}: {'; '.join(' '.join(setting) for setting in grid)}")


def bounds_hold(table: Table, rows: Sequence[Row]) -> bool:
    """Say whether fed_sb with the model's own pooling reaches its bounds."""
    held = True
    for row in rows:
        for epsilon, bound in table.bounds.items() if (row.method, row.pooling) == ("fed_sb", "own") else ():
            value = mean(row.accuracies[epsilon])
            print(f"fed_sb at epsilon {epsilon:g}: {value:.3f}, bound {bound} {'PASS' if value >= bound else 'FAIL'}")
            held &= value >= bound
    return held


if __name__ == "__main__":
    sys.exit(main())
