"""Threads of a process: as many as configured where bits matter, all of them where they do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsb.config.schema import Config

CORES = torch.get_num_threads()  # before anyone sets it: what the machine has, or OMP_NUM_THREADS allows


def use_threads(config: Config, most: int | None = None) -> None:
    """Set torch's threads, ``most`` at most: equal numbers give equal bits on every runtime."""
    wanted = config.runtime.threads
    torch.set_num_threads(wanted if most is None else min(wanted, most))


@contextmanager
def every_core() -> Iterator[None]:
    """Let torch use all cores inside the block, where bits do not matter: the server evaluates while its clients wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    try:
        yield
    finally:
        torch.set_num_threads(before)
