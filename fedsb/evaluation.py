"""Evaluation of an adapted model on tokenised examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedsb.models import AdaptedModel
from fedsb.schema import TrainConfig
from fedsb.tasks import Task
from fedsb.training import autocast, collate


def evaluate(adapted: AdaptedModel, task: Task, features: Sequence[dict[str, Any]], *, train: TrainConfig) -> dict[str, float]:
    """Return the mean loss an example and the task's metrics, whose own loss comes before it (a language model's is a token's).

    Examples are batched in order of length, which saves padding and cannot change a result beyond rounding.
    """
    order = sorted(range(len(features)), key=lambda i: (len(features[i]["input_ids"]), i))
    records, targets, total = [], [], 0.0
    adapted.model.eval()
    with torch.inference_mode(), autocast(train, adapted.device):
        for start in range(0, len(order), train.eval_batch_size):
            chunk = [features[i] for i in order[start : start + train.eval_batch_size]]
            batch = collate(chunk, adapted, task)
            outputs = task.forward(adapted.model, batch)
            total += float(task.loss(outputs, batch)) * len(chunk)
            records.append(task.record(outputs, batch))
            if "targets" in batch:
                targets.append(batch["targets"].cpu())
    metrics = task.metrics(torch.cat(records), torch.cat(targets) if targets else None)
    return {"loss": total / len(features), **metrics}
