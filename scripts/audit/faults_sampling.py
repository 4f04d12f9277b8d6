"""Samplers that are wrong in one way each, made of the real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

Steps = Iterator[list[int]]


def _drawn_by(base: Any, draws: Callable[[Any], Steps]) -> Any:
    return type(base.__name__, (base,), {"__iter__": draws})


def everyone(base: Any) -> Any:
    """Draw everyone in every step."""
    return _drawn_by(base, lambda self: ([*range(self.num_samples)] for _ in range(self.steps)))


def fixed_size(base: Any) -> Any:
    """Draw as many as are expected, without replacement."""

    def draws(self: Any) -> Steps:
        size = round(self.num_samples * self.sample_rate)
        for _ in range(self.steps):
            yield torch.randperm(self.num_samples, generator=self.generator)[:size].tolist()

    return _drawn_by(base, draws)


def one_for_all(base: Any) -> Any:
    """Draw once, and use that sample in every step."""

    def draws(self: Any) -> Steps:
        first = next(iter(base.__iter__(self)))
        yield from (first for _ in range(self.steps))

    return _drawn_by(base, draws)


def epochs(base: Any) -> Any:
    """Shuffle, and deal out batches until all have had their turn."""

    def draws(self: Any) -> Steps:
        size = round(self.num_samples * self.sample_rate)
        rest: list[int] = []
        for _ in range(self.steps):
            rest = rest or torch.randperm(self.num_samples, generator=self.generator).tolist()
            yield rest[:size]
            rest = rest[size:]

    return _drawn_by(base, draws)


def together(base: Any) -> Any:
    """Draw two neighbours by one coin."""

    def draws(self: Any) -> Steps:
        for _ in range(self.steps):
            coins = torch.rand((self.num_samples + 1) // 2, generator=self.generator) < self.sample_rate
            yield coins.repeat_interleave(2)[: self.num_samples].nonzero().flatten().tolist()

    return _drawn_by(base, draws)


def all_of(real: Any) -> Any:
    """Draw everyone for a start's exchange."""
    return lambda num_examples, rate, generator: [*range(num_examples)]
