"""How many clients train side by side: what pays, and what fits into memory."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from torch import Tensor

from fedsb.errors import UserError
from fedsb.models import AdaptedModel
from fedsb.schema import Config
from fedsb.tasks import Task
from fedsb.training import autocast, collate

AUTO = "auto"
# Side by side pays where a step is so small that the overhead of its operations counts; measured on CPUs, see docs/figures.md.
MOST_CLIENTS, MOST_TOKENS = 8, 1024
TRANSIENT = 1.5  # what a backward pass needs beside what the forward pass has saved


def stack_size(config: Config) -> int:
    """Return the number of clients that train side by side; ``auto`` takes as many as fill :data:`MOST_TOKENS` a step.

    It follows from the configuration alone: the size decides on the last bits of the results.
    """
    if config.runtime.stack != AUTO:
        return int(config.runtime.stack)
    return max(1, min(MOST_CLIENTS, MOST_TOKENS // (config.train.batch_size * config.train.max_length)))


def stack_remark(config: Config) -> str:
    """Say what ``auto`` has chosen, and why; nothing where the number was given."""
    if config.runtime.stack != AUTO:
        return ""
    tokens = config.train.batch_size * config.train.max_length
    return f"runtime.stack=auto: {stack_size(config)} side by side, at up to {tokens} tokens a client and step"


def check_stack(config: Config, adapted: AdaptedModel, task: Task) -> None:
    """Hold a stack against the memory that is free.

    Raises:
        UserError: it does not fit, or its clients are to compute their gradients in another way.
    """
    size = stack_size(config)
    if size == 1:
        return
    if config.privacy.unit == "example" and config.privacy.grad_sample_mode != "hooks":
        raise UserError(f"runtime.stack={size} needs privacy.grad_sample_mode=hooks; set runtime.stack=1 for functorch")
    each, free = client_bytes(config, adapted, task), free_bytes(adapted.device)
    if size * each > free:
        rows = rows_of_step(config)
        raise UserError(
            f"runtime.stack={size} needs about {size * each / 2**30:.1f} GiB at {rows} x {config.train.max_length} tokens a client, and "
            f"{free / 2**30:.1f} GiB are free: at most {max(1, int(free / each))} fit"
        )


def rows_of_step(config: Config) -> int:
    """Return the most examples of one client in a pass."""
    return config.privacy.max_batch if config.privacy.unit == "example" else config.train.batch_size


def client_bytes(config: Config, adapted: AdaptedModel, task: Task) -> float:
    """Estimate what one client adds to a pass: activations, factors with their gradients and optimiser, per-example gradients."""
    rows, trained = rows_of_step(config), 4 * adapted.layout.numel
    sampled = rows * trained if config.privacy.unit == "example" else 0
    return TRANSIENT * rows * example_bytes(config, adapted, task) + 4 * trained + sampled


def example_bytes(config: Config, adapted: AdaptedModel, task: Task) -> int:
    """Return what autograd keeps of one example of the greatest length between its passes."""
    known = {p.untyped_storage().data_ptr() for p in adapted.model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    longest = min(config.train.max_length, adapted.tokenizer.model_max_length if adapted.tokenizer else config.train.max_length)
    made: dict[str, Any] = {"input_ids": [1] * longest} | ({"target": 0} if task.has_head else {})
    batch = collate([made], adapted, task)
    adapted.model.train()
    try:
        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(config.train, adapted.device):
            task.forward(adapted.model, batch)
    finally:
        adapted.model.eval()
    return sum(kept.values())


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free where the model is."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
