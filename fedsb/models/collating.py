"""Batches as a model takes them, and the precision that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedsb.config.schema import TrainConfig
from fedsb.core.devices import placed
from fedsb.data import pad
from fedsb.data.batches import limit_of
from fedsb.data.packing import pack
from fedsb.models.adapted import AdaptedModel
from fedsb.tasks.task import Task

Features = Sequence[dict[str, Any]]


def collate(
    features: Features, adapted: AdaptedModel, task: Task, length: int | None = None, *, narrowed: bool = False
) -> dict[str, Tensor]:
    """Pad a batch of tokenised examples to its longest, or to ``length`` tokens, and put it on the model's device.

    Args:
        features: the examples.
        adapted: the model.
        task: makes their targets.
        length: tokens of each.
        narrowed: let the model make outputs at the places alone that the loss looks at.
    """
    assert adapted.tokenizer is not None
    batch = pad([{k: v for k, v in f.items() if k != "target"} for f in features], adapted.tokenizer, length)
    if "target" in features[0]:
        batch["targets"] = task.target_tensor([f["target"] for f in features])
    return placed(_narrowed(batch, task) if narrowed else batch, adapted.device)


def collate_packed(features: Features, adapted: AdaptedModel, task: Task, max_length: int, *, narrowed: bool = False) -> dict[str, Tensor]:
    """Pack a batch of tokenised examples into rows of ``max_length`` tokens, or the model's limit; else as :func:`collate` does."""
    assert adapted.tokenizer is not None
    batch = pack(features, adapted.tokenizer, limit_of(adapted.tokenizer, max_length))
    return placed(_narrowed(batch, task) if narrowed else batch, adapted.device)


def _narrowed(batch: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
    # Here, where the batch is on the host: how many places there are is the shape of the outputs, for which a GPU would be waited for.
    places = task.places(batch)
    return batch if places is None else {**batch, "places": places}


def autocast(train: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Return the mixed-precision context that the configuration asks for."""
    if train.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, train.autocast))
