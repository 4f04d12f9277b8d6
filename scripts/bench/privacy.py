"""What example-level privacy costs a client: CPU time and memory of private steps over plain ones. Needs the `demo` extra.

Run as ``python scripts/bench/privacy.py [--quick] [--json PATH]`` on an installed project. MiniLM, all linear layers, batches of 16
articles of 64 tokens, the same on both sides; the real training of a round on both, in turn, one thread, CPU time, medians. A sampling
rate of 1 makes every Poisson sample the whole batch. Then what it costs to hide lengths and sizes: the padding to one length against that
to the longest of the batch, on these texts and on some of 8 to 64 tokens, and ``privacy.constant_time``. Exit status 1 if a figure is above
its bound. Accuracy by epsilon is ``private_accuracy.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from figures import MIB, Figure, peak_bytes, show

import clients.sampling
from clients.clipping import Clipping
from clients.private import Mechanism, private_fit
from fedsb.adapters import write
from fedsb.app.assembly import corpus_of, model_of, task_of
from fedsb.app.client_data import client_features
from fedsb.app.own_factors import data_free
from fedsb.config.compose import load
from fedsb.config.derived import start_kind
from fedsb.config.schema import Config
from fedsb.models.adapted import AdaptedModel
from fedsb.models.fit import Site, fit
from fedsb.privacy.randomness import Streams

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
        self.many: list[dict[str, Any]] = [f for f in features if len(f["input_ids"]) == TOKENS]
        self.features = self.many[:BATCH]
        self.site = Site(0, "client-0", 1, 1)
        self.begin()

    def begin(self) -> None:
        """Bring the model to its start, which takes time that is nobody's."""
        self.adapted.reset()
        if start_kind(self.config):
            write(self.adapted.model, data_free(self.config, self.adapted))

    def plain(self) -> None:
        """Train without privacy."""
        fit(self.adapted, task_of(self.config), self.features, train=self.config.train, site=self.site)

    def private(self) -> None:
        """Train with privacy: per-example gradients, clipping, noise."""
        self.step_on(self.features)

    def step_on(self, features: list[dict[str, Any]], rate: float = 1.0, *, max_batch: int = 32, constant_time: bool = False) -> None:
        """Train with privacy on Poisson samples of some texts."""
        mechanism = Mechanism(Clipping("flat", 1.0, 1.0), rate, STEPS, max_batch=max_batch, constant_time=constant_time)
        streams = Streams(*(torch.Generator().manual_seed(number) for number in (1, 2, 3)))
        private_fit(
            self.adapted, task_of(self.config), features, train=self.config.train, site=self.site, mechanism=mechanism, streams=streams
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


@contextmanager
def padded_to_the_longest() -> Iterator[None]:
    """Pad private batches as plain ones inside the block, which is not private: to see what the one length costs."""
    own = clients.sampling.padded_length
    clients.sampling.padded_length = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        clients.sampling.padded_length = own


def prices(repeats: int) -> Iterator[Figure]:
    """Measure what hiding costs, one method for all: nearly all of a step is the frozen model's."""
    rival = Rival(CASES["fed_sb r = 16"][0])

    def longest(features: list[dict[str, Any]], max_batch: int) -> None:
        with padded_to_the_longest():
            rival.step_on(features, max_batch=max_batch)

    lengths = [8 + (TOKENS - 8) * i // (BATCH - 1) for i in range(BATCH)]
    mixed = [{k: v if k == "target" else v[:n] for k, v in f.items()} for f, n in zip(rival.features, lengths, strict=True)]
    short = [{k: v if k == "target" else v[:8] for k, v in f.items()} for f in rival.features]
    cases = (("64 tokens each", rival.features, 32), ("8 to 64 tokens, four at once by length", mixed, 4), ("8 tokens each", short, 32))
    for name, texts, at_once in cases:
        ways = {"longest": partial(longest, texts, at_once), "constant": partial(rival.step_on, texts, max_batch=at_once)}
        yield from ratios(f"texts of {name}: CPU of padding to one length over to the batch's longest", rival, ways, repeats)
    for count, rate in ((64, 1 / 4), (256, 1 / 16)):
        drawn = rival.many[:count]
        ways = {"off": partial(rival.step_on, drawn, rate), "on": partial(rival.step_on, drawn, rate, constant_time=True)}
        yield from ratios(f"n = {len(drawn)}, q = {rate:g}: CPU of constant_time over without", rival, ways, repeats)


def ratios(name: str, rival: Rival, ways: Mapping[str, Callable[[], None]], repeats: int) -> Iterator[Figure]:
    """Measure the second way over the first, in turn: the median, the lowest and the highest."""
    found = []
    for turn in range(repeats + 1):
        taken = {}
        for way in sorted(ways, reverse=bool(turn % 2)):
            rival.begin()
            taken[way] = seconds(ways[way])
        first, second = (taken[way] for way in ways)
        found.append(second / first)
    yield Figure(name, median(found[1:]))
    yield Figure(f"{name}, lowest", min(found[1:]))
    yield Figure(f"{name}, highest", max(found[1:]))


def main() -> int:
    """Measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--prices", action="store_true", help="what hiding lengths and sizes costs, alone")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    repeats = 3 if options.quick else 9
    results = [] if options.prices else [show(figure) for figure in figures(repeats)]
    results += [show(figure) for figure in prices(repeats)]
    if options.json:
        options.json.write_text(json.dumps([figure.as_json() for figure in results], indent=2) + "\n")
    return 0 if all(figure.holds for figure in results) else 1


if __name__ == "__main__":
    sys.exit(main())
