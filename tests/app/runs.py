"""Runs in this process whose language model learns what most answers are."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join
from typing import Any

from fedsb import client_app
from fedsb.config.compose import load
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve

# With the head: a tiny model's frozen one tells no word from another.
QUICK = [
    "device=cpu", "rank=4", "plots=false", "method=fedavg_lora", "train.lr=0.02", "train.local_epochs=6", "train.batch_size=4",
    "federation.num_clients=2", "federation.num_rounds=2", "eval.scores=[exact_match]", "eval.max_new_tokens=6",
]  # fmt: skip


def federated(folder: Path, overrides: list[str]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    grid = LocalGrid.simulation(client_app.app, {"overrides": join(overrides)})
    summary = serve(load(overrides), grid, folder)
    return summary, [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
