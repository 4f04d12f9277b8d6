"""The page of the comparison: what is said of kept cells is what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsb.report.groups import Group
from scripts.bench.suite.contestants import AT_CLIENTS, BASELINES, BYTES, CONTESTANTS, SEEDS, VALUES
from scripts.bench.suite.kept import Kept, at_clients, groups_of, kept, served
from scripts.bench.suite.plan import Cache
from scripts.bench.suite.sections import answers_text, chosen_text, edges_text, far_text, made_text, pairs_text

ITEMS = 400


def cell(name: str, seed: int, right: int, gap: float | None, rate: float) -> dict[str, Any]:
    """Return a cell whose model has the first ``right`` test items right."""
    bits = np.arange(ITEMS) < right
    own = name in AT_CLIENTS or name == "fedsa_lora"
    server = {"items": f"seed {seed}", "tested": ITEMS, "right": np.packbits(bits).tobytes().hex()}
    return {
        "settings": {"method.name": name, "method.setting": "federated", "rank": 8, "train.lr": rate, "seed": seed},
        "facts": {"method": name, "rank": 8, "trained_params": 5, "payload_total": 60, "exactness_gap": gap, "wall_s": 2.0},
        "measured_by": "clients" if name == "fedsa_lora" else "server",
        "rounds": [[0, 0, 0, 0, 0.2, 1.5], [1, 10, 10, 0, None, None], [2, 10, 10, 20, right / ITEMS, 0.5]],
        "gaps": [None, gap, gap],
        "gauges": [None, 0.5, 0.25],
        "extras": {"gauge": 0.25},
        "clients": {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.9}} if own else {},
        "held_out": {"a": 10, "b": 20} if own else {},
        "cpu_s": 12.0,
        "made": {"versions": {"torch": "2"}, "commit": "abc", "data": {"bbc.jsonl": "12"}},
        "asks": f"{name} {seed}",
        **({} if name == "fedsa_lora" else server),
    }


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    found = Cache(tmp_path / "kept.json")
    for name, right, gap, rate in (
        ("untouched", 80, None, 1e-3), ("fedavg_lora", 200, 0.2, 2e-3), ("fedex_lora", 280, 1e-7, 3.2e-2), ("lora_xs", 200, 1e-7, 2e-3),
        ("fed_sb", 140, 1e-8, 5e-4), ("ravan", 200, 1e-7, 8e-3), ("fedsa_lora", 0, None, 2e-3), ("fedavg_lora, at clients", 200, 0.2, 2e-3),
    ):  # fmt: skip
        found.ranks[f"bbc/values/{name}"] = {"rank": 8, "off": 0.2 if name == "ravan" else 0.01}
        found.cells |= {f"bbc/values/{name}/seed {seed}": cell(name, seed, right + seed, gap, rate) for seed in SEEDS}
    found.truths = {f"seed {seed}": "01230123" * (ITEMS // 8) for seed in SEEDS}
    return found


@pytest.fixture
def table(cache: Cache, tmp_path: Path) -> tuple[Kept, dict[str, Group]]:
    held = kept(cache, "bbc", VALUES)
    return held, groups_of(held, cache.truths, tmp_path / "runs")


def test_pairs_are_differences_of_the_bits_that_are_kept(table: tuple[Kept, dict[str, Group]]) -> None:
    text = pairs_text(*table, "accuracy")
    rows = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1:] for row in text.splitlines() if " − " in row}
    assert {*rows} == {
        "fed_sb − ravan",
        "fed_sb − lora_xs",
        *(f"{name} − fedavg_lora" for name in ("fedex_lora", "lora_xs", "fed_sb", "ravan")),
    }
    assert rows["fed_sb − ravan"][0] == str(len(SEEDS))
    assert rows["fed_sb − ravan"][1].startswith("**-0.150 [")
    assert rows["fedex_lora − fedavg_lora"][1].startswith("**+0.200 [")
    assert rows["fedex_lora − fedavg_lora"][2] == "above |"
    assert rows["lora_xs − fedavg_lora"][1:] == ["+0.000 [+0.000, +0.000]", "not told apart |"]


def test_what_tells_against_fed_sb_stands_there_as_plainly(table: tuple[Kept, dict[str, Group]]) -> None:
    told = "Of 4 exact contestants 1 (`fedex_lora`) above FedIT, 1 (`fed_sb`) below FedIT, 2 not told apart from it."
    assert answers_text(*table, "accuracy") == told


def test_who_is_off_the_budget_or_at_the_grids_edge_is_named(table: tuple[Kept, dict[str, Group]]) -> None:
    held, _ = table
    assert far_text(held).endswith("`ravan` (+20%).")
    assert "2 of 6 took" in edges_text(held)
    assert "the least 1 (`fed_sb`), the largest 1 (`fedex_lora`)" in edges_text(held)
    assert "| fed_sb | 0.0005 | 1.0e-08 | 0.25 | 12 |" in chosen_text(held)
    assert "| untouched | – | – | 0.25 | 12 |" in chosen_text(held)
    assert made_text(held) == "Made with torch 2, commit abc; SHA-256 (its first half) of `bbc.jsonl` 12."


def test_whom_its_clients_measure_stands_beside_whom_they_measure_too(table: tuple[Kept, dict[str, Group]]) -> None:
    held, groups = table
    assert [group.method for group in at_clients(groups)] == ["fedsa_lora", "fedavg_lora, at clients"]
    assert not {group.method for group in served(groups)} & {*AT_CLIENTS}
    assert held.own == len(SEEDS) * 8
    assert held.planned == len(SEEDS) * sum(VALUES in each.budgets for each in CONTESTANTS.values())


def test_baselines_stand_beside_equal_bytes_without_a_run_of_their_own(cache: Cache) -> None:
    cache.cells["bbc/bytes/fedavg_lora/seed 0"] = cell("fedavg_lora", 0, 200, 0.2, 2e-3)
    held = kept(cache, "bbc", BYTES)
    assert [*held.cells] == ["untouched", "fedavg_lora"]
    assert held.own == 1
    assert set(BASELINES) <= {*CONTESTANTS}


def test_the_chance_level_is_that_of_the_items_whose_classes_are_kept(table: tuple[Kept, dict[str, Group]]) -> None:
    kept_items = table[1]["fed_sb"].predictions[SEEDS[0]]
    assert np.bincount(kept_items.columns["truth"]).max() / ITEMS == 0.25
