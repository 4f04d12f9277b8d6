"""How many clients train side by side: what pays, and what fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedsb.adapters.quantised import stored
from fedsb.config.derived import alone_by, client_names, ranks_of
from fedsb.config.schema import Config
from fedsb.core.cohort import cohort_size, dispatch_order, draw_cohort
from fedsb.core.errors import UserError
from fedsb.core.state import Name
from fedsb.data import made_row
from fedsb.models.adapted import AdaptedModel
from fedsb.models.collating import autocast, collate
from fedsb.runtime.grid import SimulationGrid
from fedsb.runtime.placement import Seat
from fedsb.runtime.process_memory import available_bytes
from fedsb.stack.stack import Part, Stack
from fedsb.tasks.task import Task

AUTO = "auto"
# Side by side pays where a step is so small that the overhead of its operations counts; measured on CPUs, see docs/figures.md.
MOST_CLIENTS, MOST_TOKENS = 8, 1024
TRANSIENT = 1.5  # what a backward pass needs beside what the forward pass has saved


def stack_size(config: Config) -> int:
    """Return the number of clients that train side by side; ``auto`` takes as many of a round's as fill :data:`MOST_TOKENS` a step.

    It follows from the configuration alone: the size decides on the last bits of the results.
    """
    if config.runtime.stack != AUTO:
        return int(config.runtime.stack)
    if alone_by(config) is not None:
        return 1
    cohort = cohort_size(config.federation.num_clients, config.federation.fraction)
    return min(cohort, size_that_pays(config.train.batch_size * config.train.max_length))


def size_that_pays(tokens: int) -> int:
    """Return how many clients with so many tokens a step train side by side under ``auto``."""
    return max(1, min(MOST_CLIENTS, MOST_TOKENS // tokens))


def stack_remark(config: Config, grid: object) -> str:
    """Say what ``auto`` has chosen, and why, or that Flower's own runtime takes no notice; nothing where the number was given."""
    if not isinstance(grid, SimulationGrid) and config.runtime.stack != 1:
        return f"runtime.stack={config.runtime.stack}: without effect, for Flower hands out its messages one by one"
    if config.runtime.stack != AUTO or not isinstance(grid, SimulationGrid):
        return ""
    if (key := alone_by(config)) is not None:
        return f"runtime.stack=auto: 1, for {key} is not for clients side by side"
    tokens = config.train.batch_size * config.train.max_length
    return f"runtime.stack=auto: {stack_size(config)} side by side, at up to {tokens} tokens a client and step"


def ranks_remark(config: Config, grid: object, counts: Mapping[str, int]) -> str:
    """Say how many clients really train side by side where those of another rank cannot join them; nothing where all have one rank.

    Args:
        config: of the run.
        grid: that it goes over.
        counts: training examples by client, which the order of a round follows.
    """
    size = stack_size(config) if isinstance(grid, SimulationGrid) else 1
    if size == 1 or len(set(ranks_of(config).values())) < 2:
        return ""
    return f"federation.ranks: only clients of one rank train side by side, {beside(config, size, counts):.1f} on average over the run"


def beside(config: Config, size: int, counts: Mapping[str, int]) -> float:
    """Return how many clients of one rank there are on average among ``size`` that a grid hands out together."""
    ranks, clients, federation = ranks_of(config), client_names(config), config.federation
    cohort = cohort_size(len(clients), federation.fraction)
    passes = 0
    for number in range(1, federation.num_rounds + 1):
        drawn = draw_cohort(clients, cohort, seed=config.seed, round_number=number)
        order = dispatch_order(drawn, dict(counts))
        passes += sum(len({ranks.get(client) for client in order[i : i + size]}) for i in range(0, len(order), size))
    return cohort * federation.num_rounds / passes


def check_stack(config: Config, adapted: AdaptedModel, task: Task, seat: Seat | None = None) -> None:
    """Hold a stack against the memory that is free where clients compute: at ``seat``, or alone beside the server's model.

    Raises:
        UserError: it does not fit, its clients are to compute their gradients in another way, or the model would mix them or draws numbers
            that no client can have for itself.
    """
    size = stack_size(config)
    if size == 1:
        return
    if config.privacy.unit == "example" and config.privacy.grad_sample_mode != "hooks":
        raise UserError(f"runtime.stack={size} needs privacy.grad_sample_mode=hooks; set runtime.stack=1 for functorch")
    workers, device = (1, adapted.device) if seat is None else (seat.workers, torch.device(seat.device))
    each, free = client_bytes(config, adapted, task), free_bytes(device, own=device == adapted.device)
    if workers * size * each > free:
        rows, beside = rows_of_step(config), f" in each of {workers} workers" if workers > 1 else ""
        asked = f"{AUTO} ({size} side by side)" if config.runtime.stack == AUTO else size
        raise UserError(
            f"runtime.stack={asked}{beside} needs about {workers * size * each / 2**30:.1f} GiB at {rows} x {config.train.max_length} "
            f"tokens a client, and {free / 2**30:.1f} GiB are free: {_what_fits(int(free / each / workers))}"
        )
    if not keeps_apart(adapted, task):
        raise UserError("side by side this model's clients would not get the results that they get alone; set runtime.stack=1")


def _what_fits(clients: int) -> str:
    if clients > 1:
        return f"at most {clients} fit"
    return "one fits; set runtime.stack=1" if clients else "not even one does; lower train.max_length or the batch"


@torch.no_grad()
def keeps_apart(adapted: AdaptedModel, task: Task) -> bool:
    """Tell whether two clients with values and texts of their own get side by side the outputs that each of them gets alone.

    They do not where a trained tensor is tied to another module, or where the examples do not lie in the first dimension.

    Raises:
        UserError: in training it draws numbers that no client can have for itself.
    """
    own = {name: p.clone() for name, p in adapted.trainable().items()}
    stack = Stack(adapted, [torch.Generator() for _ in range(2)])
    draw = torch.Generator().manual_seed(0)
    for member in stack.members:
        for p in member.values():
            p.add_(torch.randn(p.shape, generator=draw).to(p), alpha=0.1)
    assert adapted.tokenizer is not None
    texts: list[dict[str, Any]] = [{"input_ids": made_row(adapted.tokenizer, n)} | ({"target": 0} if task.has_head else {}) for n in (7, 5)]
    parts, batch = [Part(i, 1, len(text["input_ids"])) for i, text in enumerate(texts)], collate(texts, adapted, task)
    with stack.laid():
        with stack.among(parts):
            together = task.forward(adapted.model, batch)
        with _learning(adapted.model), stack.among(parts):
            task.forward(adapted.model, batch)
    try:
        return all(_alike(together[i], _alone(adapted, task, stack.members[i], text)) for i, text in enumerate(texts))
    finally:
        for name, p in adapted.trainable().items():
            p.copy_(own[name])


@contextmanager
def _learning(model: nn.Module) -> Iterator[None]:
    """Put a model into training inside the block, whatever it draws."""
    model.train()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        model.eval()


def _alone(adapted: AdaptedModel, task: Task, values: Mapping[Name, Tensor], text: dict[str, Any]) -> Tensor:
    for name, p in adapted.trainable().items():
        p.copy_(values[name])
    return task.forward(adapted.model, collate([text], adapted, task))[0]


def _alike(together: Tensor, alone: Tensor) -> bool:
    return torch.allclose(together[: len(alone)].double(), alone.double(), rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def rows_of_step(config: Config) -> int:
    """Return the most examples of one client in a pass."""
    return config.privacy.max_batch if config.privacy.unit == "example" else config.train.batch_size


def client_bytes(config: Config, adapted: AdaptedModel, task: Task) -> float:
    """Estimate what one client adds to a pass: activations, factors with their gradients and optimiser, per-example gradients."""
    rows, trained = rows_of_step(config), 4 * adapted.layouts.learnt.numel
    sampled = rows * trained if config.privacy.unit == "example" else 0
    return TRANSIENT * rows * example_bytes(config, adapted, task) + 4 * trained + sampled


def example_bytes(config: Config, adapted: AdaptedModel, task: Task) -> int:
    """Return what autograd keeps of one example of the greatest length between its passes."""
    known = {t.untyped_storage().data_ptr() for p in adapted.model.parameters() for t in stored(p)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    assert adapted.tokenizer is not None
    longest = min(config.train.max_length, adapted.tokenizer.model_max_length)
    made: dict[str, Any] = {"input_ids": made_row(adapted.tokenizer, longest)} | ({"target": 0} if task.has_head else {})
    batch = collate([made], adapted, task)
    recorded = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with _learning(adapted.model), recorded, autocast(config.train, adapted.device):
        task.forward(adapted.model, batch)
    return sum(kept.values())


def free_bytes(device: torch.device, *, own: bool = True) -> int:
    """Return the memory that is free on a device; of a card that is not this process's own, all that it has.

    To ask another's card what is free would take hundreds of MiB of it.
    """
    if device.type != "cuda":
        return available_bytes()
    return int(torch.cuda.mem_get_info(device)[0] if own else torch.cuda.get_device_properties(device).total_memory)
