"""What example-level privacy costs a client: CPU time and memory of private steps over plain ones. Needs the `demo` extra.

Run as ``python scripts/bench_privacy.py [--quick] [--json PATH]`` on an installed project. MiniLM, all linear layers, batches of 16
articles of 64 tokens, the same on both sides; the real training of a round on both, in turn, one thread, CPU time, medians. A sampling
rate of 1 makes every Poisson sample the whole batch. Exit status 1 if a figure is above its bound. Accuracy by epsilon is
``bench_private_accuracy.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from bench_figures import MIB, Figure, peak_bytes, show

from clients.clipping import Clipping
from clients.private import Mechanism, private_fit
from fedsb.adapters import write
from fedsb.adapters.starts import DATA_FREE
from fedsb.assembly import client_features, corpus_of, model_of, task_of
from fedsb.config import load
from fedsb.models import AdaptedModel
from fedsb.privacy.randomness import Streams
from fedsb.rules import start_kind
from fedsb.schema import Config
from fedsb.training import Site, fit

BATCH, TOKENS, STEPS = 16, 64, 4
CASES: dict[str, tuple[list[str], float]] = {
    "fed_sb r = 16": (["method=fed_sb", "rank=16", "init.kind=weight_svd"], 1.10),
    "fedavg_lora r = 8": (["method=fedavg_lora", "rank=8"], 1.25),
    "head_only": (["method=head_only"], 1.25),
}
MOST_MEMORY = 1.25


class Rival:
    """A client's round, private and plain, on the same examples."""

    def __init__(self, overrides: list[str]) -> None:
        shape = [f"train.max_length={TOKENS}", f"train.batch_size={BATCH}", f"train.local_steps={STEPS}"]
        self.config: Config = load([*overrides, *shape, "device=cpu", "federation.num_clients=4", "federation.partition.kind=iid"])
        labels = corpus_of(self.config).labels
        self.adapted: AdaptedModel = model_of(self.config, labels)
        features = client_features(self.config, "client-0", None, labels)[0]
        self.features: list[dict[str, Any]] = [f for f in features if len(f["input_ids"]) == TOKENS][:BATCH]
        self.site = Site(0, "client-0", 1, 1)
        self.begin()

    def begin(self) -> None:
        """Bring the model to its start, which takes time that is nobody's."""
        self.adapted.reset()
        if kind := start_kind(self.config):
            config = self.config
            write(self.adapted.model, DATA_FREE[config.method.adapter, kind](self.adapted.weights(), config.adapter.rank, 0))

    def plain(self) -> None:
        """Train without privacy."""
        fit(self.adapted, task_of(self.config), self.features, train=self.config.train, site=self.site)

    def private(self) -> None:
        """Train with privacy: per-example gradients, clipping, noise."""
        mechanism = Mechanism(Clipping("flat", 1.0, 1.0), sampling_rate=1.0, steps=STEPS)
        streams = Streams(*(torch.Generator().manual_seed(number) for number in (1, 2, 3)))
        private_fit(
            self.adapted, task_of(self.config), self.features, train=self.config.train, site=self.site, mechanism=mechanism, streams=streams
        )  # fmt: skip

    def weights(self) -> int:
        """Return the bytes of the model."""
        return sum(p.numel() * p.element_size() for p in self.adapted.model.parameters())


def seconds(run: Callable[[], None]) -> float:
    """Return the CPU seconds of a call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def figures(repeats: int) -> Iterator[Figure]:
    """Measure every case."""
    for name, (overrides, bound) in CASES.items():
        rival = Rival(overrides)
        pairs = []
        for turn in range(repeats + 1):
            order = (rival.plain, rival.private) if turn % 2 else (rival.private, rival.plain)
            taken = {}
            for run in order:
                rival.begin()
                taken[run.__name__] = seconds(run)
            pairs.append((taken["private"], taken["plain"]))
        # The first turn pays for what is made once.
        yield Figure(f"{name}: CPU of a private step over a plain one", median(a / b for a, b in pairs[1:]), bound)
        yield Figure(f"{name}: plain step, seconds", median(b for _, b in pairs[1:]) / STEPS)
        plain, private = peak_bytes(rival.plain), peak_bytes(rival.private)
        weights = rival.weights()
        yield Figure(f"{name}: peak memory, weights included, private over plain", (private + weights) / (plain + weights), MOST_MEMORY)
        yield Figure(f"{name}: peak above the weights, MiB, plain", plain / MIB)
        yield Figure(f"{name}: peak above the weights, MiB, private", private / MIB)


def main() -> int:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    results = [show(figure) for figure in figures(3 if options.quick else 9)]
    if options.json:
        options.json.write_text(json.dumps([figure.as_json() for figure in results], indent=2) + "\n")
    return 0 if all(figure.holds for figure in results) else 1


if __name__ == "__main__":
    sys.exit(main())
