"""A training step of ABBA against one of LoRA with as many values, on MiniLM: r1 = r2 = 16 beside r = 32, batches of 16 articles."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from figures import Figure

from fedsb.app.assembly import corpus_of, task_of
from fedsb.app.client_data import client_features
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.models.build import build_model
from fedsb.models.fit import Site, fit
from fedsb.wire.frozen import FrozenView

RANK = 32
SHARED = (f"rank={RANK}", "train.max_length=64", "runtime.threads=1", "device=cpu", "federation.num_clients=2", "train.batch_size=16")


class Steps:
    """Trains MiniLM by one family, on one client's articles."""

    def __init__(self, *overrides: str) -> None:
        config = load([*SHARED, *overrides])
        labels, family = corpus_of(config).labels, config.method.adapter
        self.task = task_of(config)
        self.features: Any = client_features(config, client_names(config)[0], None, labels)[0]
        self.adapted = build_model(config.model, config.adapter, family=family, task=self.task, labels=labels, seed=0, device="cpu")
        start = next(start for start in self.adapted.spec.starts.values() if start is not None)
        self.state = self.adapted.initial.merge(start(self.adapted.weights(), RANK, 0))
        self.train = config.train

    def seconds(self, steps: int, turn: int) -> float:
        """Return the CPU time of some steps from the start."""
        self.adapted.install(self.state, FrozenView())
        begun = time.process_time()
        fit(self.adapted, self.task, self.features, train=replace(self.train, local_steps=steps), site=Site(0, str(turn), 1, 1))
        return time.process_time() - begun


def ratios(steps: int, turns: int) -> Sequence[float]:
    """Return what a turn of ABBA takes over the same one of LoRA."""
    abba, lora = Steps("method=abba"), Steps("method=fedavg_lora")
    found = [abba.seconds(steps, turn) / lora.seconds(steps, turn) for turn in range(turns + 1)]
    return found[1:]


def figures(quick: bool) -> list[Figure]:
    """Measure; the first turn warms up and does not count."""
    found = ratios(*((2, 3) if quick else (4, 9)))
    what = "step of ABBA r1 = r2 = 16 on MiniLM, CPU over LoRA's at r = 32"
    return [Figure(what, median(found), 1.35), Figure("  least of the turns", min(found)), Figure("  most of the turns", max(found))]
