"""Evaluation of an adapted model on tokenised examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsb.config.schema import TrainConfig
from fedsb.core.counting import count
from fedsb.data import packed
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import autocast, collate
from fedsb.tasks.task import Task


def evaluate(adapted: AdaptedModel, task: Task, features: Sequence[dict[str, Any]], *, train: TrainConfig) -> dict[str, float]:
    """Return the task's metrics, its loss first."""
    return task.metrics(*measured(adapted, task, features, train=train))


def measured(adapted: AdaptedModel, task: Task, features: Sequence[dict[str, Any]], *, train: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """Return what the task's metrics are made of, a row an example in their order, and the targets.

    Examples are batched in order of length, which saves padding and cannot change a result beyond rounding. Outputs do not outlive their
    batch: a language model's are the largest tensors of all.
    """
    batches = packed([len(f["input_ids"]) for f in features], most=train.eval_batch_size, tokens=train.eval_tokens)
    adapted.model.eval()
    with torch.inference_mode(), autocast(train, adapted.device):
        found = []
        count("examples", 0, len(features))
        for batch in batches:
            found.append(_recorded(adapted, task, [features[i] for i in batch]))
            count("examples", sum(len(records) for records, _ in found), len(features))
    back = torch.tensor([i for batch in batches for i in batch]).argsort()
    targets = [each for _, each in found if each is not None]
    return torch.cat([records for records, _ in found])[back], torch.cat(targets)[back] if targets else None


def _recorded(adapted: AdaptedModel, task: Task, chunk: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor | None]:
    """Return what the metrics need of a batch, and its targets."""
    batch = collate(chunk, adapted, task, narrowed=True)
    return task.record(task.forward(adapted.model, batch), batch), batch["targets"].cpu() if "targets" in batch else None
