"""From where on a private gradient start beats a data-free one: accuracy by shard size, epsilon and lever. Needs the `demo` extra.

Run as ``python scripts/bench_private_start.py [--cache PATH] [--minutes M]`` on an installed project. Shards of 320, 3,000 and 30,000
examples are drawn with replacement from the beginnings of the training articles of BBC News (repeated articles count as examples of their
own: what matters here is how much noise a client of that size needs). Every row is a whole private federation of ``fed_sb``; of each lever
the start from the clients' gradients stands beside the data-free one with the same rank, layers and epsilon. The forecast is the bound on
the sketch's signal-to-noise that a run prints before it begins. Finished runs are kept in the cache file.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_private_accuracy import Cache, cell
from split_data import write_rows

from fedsb.assembly import corpus_of
from fedsb.client_app import app
from fedsb.config import load
from fedsb.private_run import start_snr
from fedsb.rng import numpy_generator
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import planned, prepare

SHARDS = (320, 3_000, 30_000)
EPSILONS = (1.0, 3.0, 8.0, None)  # None: without privacy, to see what noise has to do with it
CLIENTS, FRACTION = 2, 0.3
CHARACTERS = 200  # of a text: 32 tokens are all that is used of it, and a table of 60,000 is read once a seed
BASE = (
    "method=fed_sb", f"federation.num_clients={CLIENTS}", "federation.partition.kind=iid", "federation.num_rounds=10",
    "train.local_steps=1", "train.batch_size=160", "train.max_length=32", "federation.exactness=false", "privacy=example", "data=files",
    "data.text=text", "data.label=label", "train.lr=0.2",
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
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cache = Cache(options.cache, time.monotonic() + 60 * options.minutes)
    print("\n" + "\n".join(rows(options, cache)))
    return 0


def rows(options: argparse.Namespace, cache: Cache) -> Iterator[str]:
    """Yield the lines of the table in Markdown."""
    head = ["examples a client", "epsilon", "private start by", "forecast", "private start", "data-free start", "lead, points"]
    yield "| " + " | ".join(head) + " |\n|" + "---|" * len(head)
    for shard in options.shards:
        table = resampled(options.data, shard)
        for epsilon in EPSILONS:
            for lever, (shared, own) in LEVERS.items():
                base = [*BASE, *table, f"privacy.epsilon={epsilon}", *shared]
                starts = [[*PRIVATE, *own], [*FREE]]
                if epsilon is None:
                    base, *starts = ([o for o in overrides if not o.startswith("privacy")] for overrides in (base, *starts))
                private, free = ([cache.accuracy([*base, *start, f"seed={seed}"], "test") for seed in options.seeds] for start in starts)
                lead = [100 * (a - b) for a, b in zip(private, free, strict=True)]
                snr = "–" if epsilon is None else f"{forecast([*base, *PRIVATE, *own, f'seed={options.seeds[0]}']):.2f}"
                target = "none" if epsilon is None else f"{epsilon:g}"
                yield f"| {shard:,} | {target} | {lever} | {snr} | {cell(private)} | {cell(free)} | {cell(lead, 1)} |"


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
