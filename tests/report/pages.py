"""Runs for a page: three methods at two seeds, with metrics of clients, a partition and, of one method, a claim; what a page holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fedsb.report.comparing import comparisons
from fedsb.report.methods import Asked
from fedsb.report.page.page import write_page
from fedsb.run.folder import RunFolder, read_run
from tests.report.made import keep_predictions, make_config, make_records, make_summary

PARTITION = {
    "label_skew": 0.25,
    "labels": ["business", "sports"],
    "sizes": {"client-0": 40, "client-1": 10},
    "label_shares": {"client-0": [0.75, 0.25], "client-1": [0.0, 1.0]},
}
METHODS = ("fed_sb", "fedavg_lora", "fedex_lora")  # in the order of their folders
SEEDS = (0, 1)


def make_folder(
    path: Path, method: str, seed: int, *, rounds: int = 3, data: str = "bbc_news", epsilon: float | None = None, asked: float | None = None
) -> Path:
    """Write the folder of a finished run whose figures are its own; ``asked`` is the epsilon of its configuration."""
    records = [
        replace(
            record,
            metrics={**record.metrics, "accuracy": record.metrics["accuracy"] - 0.05 * seed - 0.01 * METHODS.index(method)},
            client_metrics={f"client-{i}": {"accuracy": 0.5 + 0.1 * i + 0.01 * seed} for i in range(2)} if record.round == rounds else {},
            held_out={"client-0": 4, "client-1": 1} if record.round == rounds else {},
            payload_up=record.payload_up + 1_000 * seed if record.round else 0,
            payload_one_off=record.payload_one_off + 50_000 * seed if record.payload_one_off else 0,
            exactness_gap=None if record.exactness_gap is None else record.exactness_gap * (1 + seed),
            wall_s=(record.wall_s or 0.0) + 2 * seed,
        )
        for record in make_records(method, rounds)
    ]
    folder = RunFolder(path)
    config = make_config(method, 16, seed, rounds)
    config |= {} if asked is None else {"privacy": {"unit": "example", "epsilon": asked}}
    folder.write_config(yaml.safe_dump({**config, "data": {**config["data"], "kind": data}}))  # type: ignore[dict-item]
    for record in records:
        folder.append(record)
    claim = {
        "max": epsilon, "min": epsilon, "unit": "example", "delta": 1e-5, "accountant": "prv", "target": epsilon, "simulated": True,
        "noise_multiplier": {"max": 1.0, "min": 1.0}, "clients": {}, "silent": [], "not_covered": "much",
    }  # fmt: skip
    claimed = {"partition": PARTITION} if epsilon is None else {"epsilon": claim, "epsilon_reason": None}
    folder.write_summary({**make_summary(records, method, seed=seed, rounds=rounds), **claimed})
    (path / "report.md").write_text("as the run wrote it")
    keep_predictions(path, [int(i < 20 + 4 * METHODS.index(method)) for i in range(40)], f"test {seed}")
    return path


def make_sweep(folder: Path) -> list[Path]:
    """Write the runs of a sweep, those of FedEx-LoRA private ones."""
    return [
        make_folder(folder / f"{method}-{seed}", method, seed, epsilon=3.0 + seed if method == "fedex_lora" else None)
        for method in METHODS
        for seed in SEEDS
    ]


def page_of(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of runs alone: their reports and plots take seconds."""
    out.mkdir(parents=True, exist_ok=True)
    return write_page(out / "comparison.html", comparisons([read_run(folder) for folder in folders], Asked()), out)


def data_of(page: Path) -> list[dict[str, Any]]:
    """Return what the script of a page draws, a part for each data."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), flags=re.DOTALL)
    assert found
    return json.loads(found[1])


def retold(folder: Path, change: Callable[[dict[str, Any]], object], last: int = -1) -> None:
    """Change a record of a run where it lies."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    change(records[last])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def rows_of(part: dict[str, Any], key: str, variant: int = 0) -> dict[str, dict[str, Any]]:
    """Return the rows of a chart by the label of their group."""
    [chart] = [each for each in part["charts"] if each["key"] == key]
    return {part["groups"][row["g"]]["label"]: row for row in chart["variants"][variant]["rows"]}
