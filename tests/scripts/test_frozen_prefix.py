"""Looking the lower layers up changes nothing but the time: the same logits and gradients, padding and unseen texts included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedsb.config.compose import load
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.tasks.task import TASKS
from scripts.bench.frozen_prefix import remember_prefix

BATCH = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0], [2, 4, 8, 3, 0]])
LATER = torch.tensor([[2, 9, 3], [2, 11, 3]])


def made(folder: Path, method: str) -> AdaptedModel:
    config = load(["model=pretrained", f"model.name={folder}", f"method={method}", "adapter.targets=[layer.1.*]", "rank=3"])
    family, task = config.method.adapter, TASKS["classification"]
    return build_model(config.model, config.adapter, family=family, task=task, labels=("a", "b"), seed=0)


def outcome(adapted: AdaptedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits, and the gradients of what is trained."""
    adapted.model.zero_grad()
    logits = adapted.model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    logits.square().sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in adapted.trainable().values())]


@pytest.mark.parametrize("method", ["fed_sb", "fedavg_lora", "head_only"])
def test_what_lies_below_the_adapters_is_computed_once_and_nothing_changes(tiny_bert, method):
    adapted = made(tiny_bert, method)
    layers = adapted.model.bert.encoder.layer
    calls: list[object] = []
    for layer in layers:
        layer.attention.register_forward_hook(lambda module, *_: calls.append(module))
    before = [outcome(adapted, ids) for ids in (BATCH, LATER)]
    remember_prefix(adapted)
    remember_prefix(adapted)
    for _ in range(2):
        calls.clear()
        for expected, ids in zip(before, (BATCH, LATER), strict=True):
            for a, b in zip(expected, outcome(adapted, ids), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    above = 0 if method == "head_only" else 1
    assert len(calls) == 2 * above
