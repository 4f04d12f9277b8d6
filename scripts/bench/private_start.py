"""From where on a private gradient start beats a data-free one: accuracy by shard size, epsilon and lever. Needs the `demo` extra.

Run as ``python scripts/bench/private_start.py [--cache PATH] [--minutes M]`` on an installed project. Shards of 320, 3,000 and 30,000
examples are drawn with replacement from the beginnings of the training articles of BBC News (repeated articles count as examples of their
own: what matters here is how much noise a client of that size needs). Every cell is a whole private federation of ``fed_sb``; of each lever
the start from the clients' gradients stands beside the data-free one with the same rank, layers and epsilon, both at the same rates: the
directions of the gradient pull harder, and a rate that is right for one start is wrong for the other. The lead is that of the better rate
of the one over the better rate of the other. The forecast is the bound on the sketch's signal-to-noise that a run prints before it begins.
Finished runs are kept in the cache file.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from private_accuracy import Cache, cell

from fedsb.app.assembly import corpus_of
from fedsb.app.prepare import planned, prepare
from fedsb.app.private_run import start_snr
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.core.rng import numpy_generator
from fedsb.data.writing import write_rows
from fedsb.runtime.local import LocalGrid

SHARDS = (320, 3_000, 30_000)
EPSILONS = (1.0, 3.0, 8.0, None)  # None: without privacy, to see what noise has to do with it
RATES = (0.05, 0.2)
CLIENTS, FRACTION = 2, 0.3
CHARACTERS = 200  # of a text: 32 tokens are all that is used of it, and a table of 60,000 is read once a seed
BASE = (
    "method=fed_sb", f"federation.num_clients={CLIENTS}", "federation.partition.kind=iid", "federation.num_rounds=10",
    "train.local_steps=1", "train.batch_size=160", "train.max_length=32", "federation.exactness=false", "privacy=example", "data=files",
    "data.text=text", "data.label=label",
)  # fmt: skip
FREE = ("init.kind=weight_svd",)
PRIVATE = ("init.kind=gradient", f"privacy.init_fraction={FRACTION}", "init.num_examples=1600")
LAYER, SCALE_2 = "adapter.targets=[layer.5.*]", "adapter.alpha=32"
# What is varied -> overrides shared with its data-free counterpart, overrides of the private start alone.
LEVERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "two exchanges": ((LAYER, SCALE_2), ("init.power_iterations=0",)),
    "four exchanges (one power iteration)": ((LAYER, SCALE_2), ("init.power_iterations=1",)),
    "two, every example scaled to the clipping norm": ((LAYER, SCALE_2), ("init.power_iterations=0", "privacy.init_normalise=true")),
    "two, query and value only, rank 4": (
        ("adapter.targets=[layer.5.*.query,layer.5.*.value]", "rank=4", "adapter.alpha=8"),
        ("init.power_iterations=0", "init.oversample=2"),
    ),
}


def main() -> int:
    """Run what is not in the cache yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path("bench_private_start.json"), metavar="PATH", help="finished runs")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir()) / "fedsb-shards", metavar="DIR", help="resampled tables")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after so many")
    parser.add_argument("--shards", type=int, nargs="+", default=list(SHARDS))
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS, metavar="LEVER")
    parser.add_argument("--epsilons", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cache = Cache(options.cache, time.monotonic() + 60 * options.minutes)
    print("\n" + "\n".join(rows(options, cache)))
    return 0


def rows(options: argparse.Namespace, cache: Cache) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    starts = [f"{start} start, lr {rate:g}" for start in ("private", "data-free") for rate in options.rates]
    head = ["examples a client", "epsilon", "private start by", "forecast", *starts, "lead, points"]
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for shard in options.shards:
        table = resampled(options.data, shard)
        for epsilon in options.epsilons:
            for lever, (shared, own) in ((name, LEVERS[name]) for name in options.levers):
                found = [
                    [accuracies([*shared, *start], table, epsilon, rate, options, cache) for rate in options.rates]
                    for start in starts_of(own)
                ]
                lead = 100 * (best(found[0]) - best(found[1]))
                snr = "–" if epsilon is None else f"{forecast([*run_of(table, epsilon, options.rates[0]), *shared, *PRIVATE, *own]):.2f}"
                target = "none" if epsilon is None else f"{epsilon:g}"
                cells = " | ".join(cell(seeds) for start in found for seeds in start)
                yield f"| {shard:,} | {target} | {lever} | {snr} | {cells} | {lead:+.1f} |"


def best(rates: Sequence[Sequence[float]]) -> float:
    """Return the mean accuracy at the better rate, of the seeds that are done."""
    return max((mean(done) for done in ([a for a in seeds if a == a] for seeds in rates) if done), default=math.nan)


def starts_of(own: Sequence[str]) -> list[Sequence[str]]:
    """Return the overrides of the private start with a lever, and of the data-free one."""
    return [[*PRIVATE, *own], [*FREE]]


def run_of(table: Sequence[str], epsilon: float | None, rate: float) -> list[str]:
    """Return the overrides that all runs of a cell share."""
    return [*BASE, f"train.lr={rate:g}", *table, f"privacy.epsilon={epsilon}"]


def accuracies(
    more: Sequence[str], table: Sequence[str], epsilon: float | None, rate: float, options: argparse.Namespace, cache: Cache
) -> list[float]:
    """Return the final accuracy of each seed."""
    overrides = [*run_of(table, epsilon, rate), *more]
    if epsilon is None:
        overrides = [o for o in overrides if not o.startswith("privacy")]
    return [cache.accuracy([*overrides, f"seed={seed}"], "test") for seed in options.seeds]


def forecast(overrides: Sequence[str]) -> float:
    """Return the bound on the signal-to-noise of the start's sketches."""
    config = load(list(overrides))
    prepared = planned(prepare(config), LocalGrid.simulation(app, {"overrides": shlex.join(overrides)}))
    return start_snr(config, list(prepared.plans.values()), prepared.adapted.shapes)


def resampled(folder: Path, shard: int) -> Sequence[str]:
    """Write a table of ``CLIENTS`` shards, once, and return the overrides that read it; δ is a tenth of one over the shard."""
    config = load(["federation.partition.kind=iid"])
    corpus = corpus_of(config)
    train, test = folder / f"train-{shard}.jsonl", folder / "test.jsonl"
    if not train.exists():
        drawn = numpy_generator(0, "resample", shard).integers(len(corpus.train), size=CLIENTS * shard)
        cfg = replace(config.data, text="text", label="label")
        for path, part in ((test, corpus.test), (train, corpus.train.take(int(i) for i in drawn))):
            write_rows(path, replace(part, texts=tuple(text[:CHARACTERS] for text in part.texts)), cfg, labels=corpus.labels)
    return [f"data.path={train}", f"data.test_path={test}", f"privacy.delta={0.1 / shard:g}"]


if __name__ == "__main__":
    sys.exit(main())
