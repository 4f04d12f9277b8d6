"""What a round of private training released and drew, step by step: read off the real code by instruments that change nothing in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from exact import Bits, Values
from torch import Tensor

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from fedsb.models.fit import OPTIMIZERS
from fedsb.tasks.task import Batch, Classification


@dataclass(frozen=True)
class Release:
    """What left a client, or the server.

    Attributes:
        values: one vector for each release: the noised sum over the clipping bound.
        drawn: (releases, examples), the samples; None where nothing is sampled.
        counts: of each release that adaptive clipping goes by, noised: the norms below the bound less half of all.
    """

    values: tuple[Values, ...]
    drawn: Bits | None = None
    counts: Values | None = None


@dataclass
class Watch:
    """Instruments for some clients that train.

    Attributes:
        owners: of each client, its examples among all.
        steps: of each client, what was handed to the optimiser, the bound then, and what had been drawn.
    """

    owners: Sequence[range]
    steps: list[list[tuple[Values, float, set[int]]]] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)

    def stepped(self, client: int, gradient: Values, bound: float) -> None:
        """Note a step of a client; what its examples were asked for since its last step was this step's sample."""
        drawn = {i for i in self.pending if i in self.owners[client]}
        self.pending -= drawn
        self.steps[client].append((gradient, bound, drawn))

    def release(self, expected: float, settings: Clipping, last: float) -> Release:
        """Return what all clients released together: the values of one after those of the other.

        Args:
            expected: sample of one client.
            settings: of the clipping.
            last: bound after the last step, of the only client.
        """
        together = list(zip(*self.steps, strict=True))
        values = tuple(np.concatenate([g * expected / bound for g, bound, _ in step]) for step in together)
        drawn = np.zeros((len(together), self.owners[-1].stop), dtype=bool)
        for t, step in enumerate(together):
            drawn[t, sorted(set().union(*(ids for *_, ids in step)))] = True
        counts = None
        if settings.kind == "adaptive":
            bounds = [bound for _, bound, _ in self.steps[0]] + [last]
            moves = np.array([math.log(after / before) for before, after in pairwise(bounds)])
            counts = (settings.quantile - 0.5 - moves / settings.quantile_lr) * expected
        return Release(values, drawn, counts)


class WatchedTask(Classification):
    """Notes whose losses are computed.

    Args:
        watch: where.
        examples: known by their texts, or by the first token that a zeroed one keeps.
    """

    def __init__(self, watch: Watch, examples: Sequence[Mapping[str, Any]]) -> None:
        self.watch = watch
        self.known = {tuple(text): i for i, e in enumerate(examples) for text in (e["input_ids"], e["input_ids"][:1])}

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each example."""
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
        self.watch.pending.update(self.known.get(tuple(row[:length]), -1) for row, length in rows)
        self.watch.pending.discard(-1)
        return super().losses(outputs, batch)


def watched_clipping(kind: type[FlatClipping]) -> type[FlatClipping]:
    """Return a class that tells the optimiser inside the bound of each step."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def add_noise(self) -> None:
            self.original_optimizer.bound = float(self.max_grad_norm)
            super().add_noise()

    return cast(type[FlatClipping], Watched)


@contextmanager
def watching(kind: str, owners: Sequence[range]) -> Iterator[Watch]:
    """Watch rounds inside the block; clients' optimisers are made in the order of the clients."""
    watch, plain = Watch(owners), OPTIMIZERS["sgd"]

    def sgd(parameters: Any, train: Any) -> torch.optim.Optimizer:
        inner, client = cast(Any, plain(parameters, train)), len(watch.steps)
        watch.steps.append([])
        move = inner.step

        def step(*args: Any) -> Any:
            gradient = torch.cat([p.grad.detach().flatten() for group in inner.param_groups for p in group["params"]])
            watch.stepped(client, gradient.double().numpy(), inner.bound)
            return move(*args)

        inner.step = step
        return cast(torch.optim.Optimizer, inner)

    with replaced(OPTIMIZERS, "sgd", sgd), replaced(CLIPPINGS, kind, watched_clipping(CLIPPINGS[kind])):
        yield watch


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Put something in another's place inside the block: an attribute of a module or class, or a row of a table."""
    table = isinstance(owner, MutableMapping)
    old = owner[name] if table else getattr(owner, name)
    put = owner.__setitem__ if table else lambda key, value: setattr(owner, key, value)
    put(name, new)
    try:
        yield
    finally:
        put(name, old)
