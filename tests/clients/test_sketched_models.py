"""A clipped sum of a language model is the same by any micro-batches, makes no dense gradient, and leaves the model as found."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clients.private_evidence import clipped_sketch
from fedsb.adapters import layers
from fedsb.adapters.starts import Side
from fedsb.config.compose import load
from fedsb.core.rng import numpy_generator
from fedsb.core.state import Name, State, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.tasks.task import TASKS
from tests.clients.evidence_cases import Chain, DenseWatch, adapt, chain, probes_for
from tests.clients.sketch_cases import SIDES, Losses, assert_clipped_sum, example_products, inputs, norm, scaled_losses

BATCHES: tuple[int, ...] = (3, 1, 2)


@cache
def language_model(folder: Path, task: str) -> AdaptedModel:
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", "adapter.dropout=0.2"])
    return build_model(config.model, config.adapter, family="lora_sb", task=TASKS[task], labels=("a", "b", "c"), seed=0)


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[AdaptedModel, Losses, Callable[..., list[Any]]]:
    """A language model, its losses, and batches of 6 texts of unequal length with given sizes."""
    task = TASKS[{"tiny_bert": "classification", "tiny_gpt2": "causal_lm"}[request.param]]
    adapted = language_model(request.getfixturevalue(request.param), task.name)
    draw = numpy_generator(0, "texts")
    texts = [{"input_ids": draw.integers(4, 30, n).tolist(), "target": n % 3} for n in (2, 9, 5, 3, 12, 7)]

    def batches(*counts: int) -> list[Any]:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [collate(texts[end - count : end], adapted, task) for end, count in zip(ends, counts, strict=True)]

    return adapted, lambda model, batch: task.losses(task.forward(model, batch), batch), batches


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_sum_on_language_models_whatever_the_micro_batches(case: Any, side: Side, normalise: bool) -> None:
    """The single examples are without padding, the micro-batches with."""
    adapted, losses, batches = case
    probes = probes_for(adapted.model, side)
    products = example_products(adapted.model, losses, batches(*[1] * 6), probes, side)
    max_norm = sorted(norm(p) for p in products)[2] * 1.01
    for counts in (BATCHES, (6,), (1,) * 6):
        found = clipped_sketch(adapted.model, batches(*counts), losses, probes=probes, side=side, max_norm=max_norm, normalise=normalise)
        assert_clipped_sum(found, products, max_norm, normalise)


@pytest.mark.parametrize("side", SIDES)
def test_no_tensor_of_the_gradients_size_is_made(case: Any, side: Side) -> None:
    adapted, losses, batches = case
    # With these sizes no activation has as many values as a gradient.
    probes, drawn = probes_for(adapted.model, side), batches(3, 1)
    with DenseWatch(adapted.model) as watch:
        clipped_sketch(adapted.model, drawn, losses, probes=probes, side=side, max_norm=1.0)
    assert watch.found == []


def test_model_and_global_generator_are_left_as_found(case: Any) -> None:
    adapted, losses, batches = case
    model = adapted.model.train()
    trainable, before = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    found = [
        clipped_sketch(model, batches(*BATCHES), losses, probes=probes_for(model, "right"), side="right", max_norm=0.1).sum
        for _ in range(2)
    ]
    assert norm(subtract(*found)) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert_left_alone(model, trainable)


def assert_left_alone(model: nn.Module, trainable: list[bool]) -> None:
    assert all(module.training for module in model.modules())
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


class TokensFirst(Chain):
    """Hands its layers rows that belong to no example in particular."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(len(x), -1)


def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    scaled_losses(model, batch)
    raise RuntimeError("no losses")


@pytest.mark.parametrize(
    ("build", "losses", "error", "message"),
    [
        (Chain, failing, RuntimeError, "no losses"),
        (Chain, lambda model, batch: scaled_losses(model, batch).mean(), ValueError, "one loss per example"),
        (Chain, lambda model, batch: batch[1], ValueError, "depends on no adapted layer"),
        (TokensFirst, scaled_losses, ValueError, "'second' is given 6 rows for 2 examples"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_model_is_restored_when_it_is_refused(build: type[Chain], losses: Losses, error: type[Exception], message: str, side: Side) -> None:
    model = adapt(build(nn.Linear, (5, 4, 3))).train()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        clipped_sketch(model, [inputs([1.0, 1.0], 3, 5)], losses, probes=probes_for(model, side), side=side, max_norm=1.0)
    assert_left_alone(model, trainable)


def test_wrong_probes_and_norms_are_refused() -> None:
    model = chain(nn.Linear, (5, 4, 3))
    with pytest.raises(ValueError, match=r"probes for \['elsewhere'\] don't fit the adapted layers"):
        clipped_sketch(model, [], scaled_losses, probes=State({Name("elsewhere", "P"): torch.ones(5, 2)}), side="right", max_norm=1.0)
    for max_norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clipped_sketch(model, [], scaled_losses, probes=probes_for(model, "right"), side="right", max_norm=max_norm)
