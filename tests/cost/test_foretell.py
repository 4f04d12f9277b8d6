"""Counts of published models from their public dimensions, and what a run's bytes are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fedsb.adapters.residual import dense_is_cheaper
from fedsb.config.compose import load
from fedsb.cost.foretell import Cost
from fedsb.cost.table import cost_of, costs
from tests.strategies.federations import in_rounds


@dataclass(frozen=True)
class Shape:
    """Public dimensions of a decoder: hidden d, feed-forward f, layers, width of all query heads and of all key-value heads."""

    d: int
    f: int
    layers: int
    queries: int
    keys: int

    @property
    def modules(self) -> list[tuple[int, int]]:
        """(out, in) of q, k, v, o, gate, up and down."""
        d, f = self.d, self.f
        return [(self.queries, d), (self.keys, d), (self.keys, d), (d, self.queries), (f, d), (f, d), (d, f)]

    def lora(self, rank: int) -> int:
        """Return ``layers · r · Σ (m + n)``: B (m, r) and A (r, n) of each linear layer."""
        return self.factor("B", rank) + self.factor("A", rank)

    def factor(self, name: str, rank: int) -> int:
        """Return ``layers · r · Σ m`` for B, ``layers · r · Σ n`` for A."""
        return self.layers * rank * sum(m if name == "B" else n for m, n in self.modules)

    def cores(self, rank: int) -> int:
        """Return ``layers · 7 · r²``."""
        return self.layers * len(self.modules) * rank**2

    def fedex(self, clients: int, rank: int) -> int:
        """Return what FedEx sends down to a client: means, and factors of rank (k − 1) r or W's own shape, whichever is smaller."""
        return self.lora(rank) + self.added((clients - 1) * rank)

    def added(self, rank: int) -> int:
        """Return what is sent of a sum on W0: factors of a rank, or W0's own shape, whichever is smaller."""
        return self.layers * sum(min(m * n, rank * (m + n)) for m, n in self.modules)


MODELS = {
    "mistral_7b": Shape(d=4096, f=14336, layers=32, queries=32 * 128, keys=8 * 128),
    "gemma_2_9b": Shape(d=3584, f=14336, layers=42, queries=16 * 256, keys=8 * 256),
    "llama_3_2_3b": Shape(d=3072, f=8192, layers=28, queries=24 * 128, keys=8 * 128),
}
CLIENTS = {"mistral_7b": 25, "gemma_2_9b": 25, "llama_3_2_3b": 5}


# Those whose counts are written down here; costing all takes a second each.
COUNTED = ("fed_sb", "fedavg_lora", "fedex_lora", "ffa_lora", "fedsa_lora", "rolora", "flora")


@pytest.fixture(scope="module")
def counted() -> Callable[[str], dict[str, Cost]]:
    """Return the costs of methods at the published setting: LoRA of rank 32, Fed-SB of rank 200, all clients, a round a turn."""

    @cache
    def count(model: str) -> dict[str, Cost]:
        setting = [f"federation.num_clients={CLIENTS[model]}", in_rounds(1), "rank=32", "cost.rank.fed_sb=200"]
        return costs([f"model={model}", "data.task=causal_lm", *setting], COUNTED).found

    return count


# Millions of values: LoRA, FedEx down, and Fed-SB's cores by rank, as published in the figures of the Fed-SB paper and recounted.
PUBLISHED = {
    "mistral_7b": (83.89, 2097.2, {120: 3.23, 160: 5.73, 200: 8.96}),
    "gemma_2_9b": (108.04, 2700.9, {120: 4.23, 160: 7.53, 200: 11.76}),
    "llama_3_2_3b": (48.63, 243.1, {120: 2.82, 160: 5.02, 200: 7.84}),
}
Counted = Callable[[str], dict[str, Cost]]


@pytest.mark.parametrize("model", PUBLISHED)
def test_counts_are_the_published_ones(counted: Counted, model: str) -> None:
    lora, fedex, cores = PUBLISHED[model]
    found = counted(model)
    assert found["fedavg_lora"].trained / 1e6 == pytest.approx(lora, rel=1e-3)
    assert found["fedex_lora"].down / 1e6 == pytest.approx(fedex, rel=1e-3)
    assert found["fed_sb"].trained / 1e6 == pytest.approx(cores[200], rel=1e-3)
    for rank, published in cores.items():  # of which two decimals are given
        assert MODELS[model].cores(rank) / 1e6 == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("model", MODELS)
def test_counts_follow_from_the_dimensions(counted: Counted, model: str) -> None:
    shape, found = MODELS[model], counted(model)
    assert found["fedavg_lora"].trained == found["fedavg_lora"].up == found["fedavg_lora"].down == shape.lora(32)
    assert found["fedex_lora"].up == shape.lora(32)
    assert found["fedex_lora"].down == shape.fedex(CLIENTS[model], 32)
    assert found["fed_sb"].trained == found["fed_sb"].up == found["fed_sb"].down == shape.cores(200)
    assert found["ffa_lora"].trained == found["ffa_lora"].up == found["ffa_lora"].down == shape.factor("B", 32)
    assert found["fedsa_lora"].up == found["fedsa_lora"].down == shape.factor("A", 32)
    assert found["rolora"].trained == found["fedsa_lora"].trained == found["flora"].up == shape.lora(32)
    assert 2 * found["rolora"].up == 2 * found["rolora"].down == shape.lora(32)  # one factor a round
    assert found["flora"].down == shape.added(CLIENTS[model] * 32)  # the stack; the factors that begin anew cost nothing


@pytest.mark.parametrize("rank", [120, 160])
def test_cores_of_other_ranks_follow_too(rank: int) -> None:
    found = cost_of(load(["model=llama_3_2_3b", "data.task=causal_lm", f"rank={rank}"]))
    assert found.trained == MODELS["llama_3_2_3b"].cores(rank)


@pytest.mark.parametrize("model", MODELS)
def test_the_one_off_is_told(counted: Counted, model: str) -> None:
    """B and A of rank r, and the start's exchanges: Y, Z, Y, Z up and Q, P, Q down, of width r + 8; the first probe is drawn at home."""
    shape, found = MODELS[model], counted(model)["fed_sb"]
    sides = [(m, n, min(208, m, n)) for m, n in shape.modules]
    up = sum(2 * width * (m + n) for m, n, width in sides)
    down = sum(width * (2 * m + n) for m, n, width in sides)
    assert found.one_off == shape.lora(200) + shape.layers * (up + down)
    assert found.payload_one_off == 4 * CLIENTS[model] * found.one_off
    assert found.payload == found.payload_up + found.payload_down + found.payload_one_off
    assert found.payload_up == found.payload_down == 4 * CLIENTS[model] * shape.cores(200)


def test_a_single_method_keeps_its_own_overrides(tiny_bert: Path, tiny_csv: Path) -> None:
    more = ["method=fedex_lora", "method.options.truncate=4", "rank=2", "federation.num_clients=10"]
    found = costs([*classifier(tiny_bert, tiny_csv), *more], ("fedex_lora", "fed_sb")).found
    assert found["fedex_lora"].down == (2 + 4) * SIDES + HEAD  # means of rank 2, and of 9 · 2 ranks of the residual 4
    assert found["fed_sb"].rank == 2


# Two layers of four (32, 32), one (48, 32) and one (32, 48): Σ (m + n). Three labels on a hidden size of 32.
SIDES, HEAD = 2 * (4 * 64 + 2 * 80), 3 * 32 + 3


def classifier(model: Path, table: Path) -> list[str]:
    return ["model=pretrained", f"model.name='{model}'", "data=files", f"data.path='{table}'"]


def test_a_classifier_counts_its_head(tiny_bert: Path, tiny_csv: Path) -> None:
    found = costs([*classifier(tiny_bert, tiny_csv), "rank=3"], ("fed_sb", "fedavg_lora")).found
    assert found["fed_sb"].trained == 2 * 6 * 3**2 + HEAD
    assert found["fedavg_lora"].trained == 3 * SIDES + HEAD


def test_a_dense_sum_is_counted_where_factors_are_larger(tiny_bert: Path, tiny_csv: Path) -> None:
    """Nine ranks of 2 are 18: above 32 · 32 / 64 = 16, below 48 · 32 / 80 = 19.2."""
    found = cost_of(load([*classifier(tiny_bert, tiny_csv), "method=fedex_lora", "rank=2", "federation.num_clients=10"]))
    assert found.down == 2 * SIDES + HEAD + 2 * (4 * 32 * 32 + 2 * 18 * 80)
    assert dense_is_cheaper(18, 32, 32)
    assert not dense_is_cheaper(18, 48, 32)
