"""Random streams: every draw has a name, so a result never depends on who ran before it or in which process.

A stream is named by (seed, purpose, …) where the rest is a client, a round or a module. No function of this project draws from
a global generator except inside :func:`global_generators`, which restores it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *key: str | int) -> int:
    """Derive the 63-bit seed of the stream named by ``seed``, ``purpose`` and ``key``."""
    text = "\x1f".join([str(seed), purpose, *map(str, key)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, purpose: str, *key: str | int) -> torch.Generator:
    """Return a CPU generator at the start of the named stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *key))


def numpy_generator(seed: int, purpose: str, *key: str | int) -> np.random.Generator:
    """Return a NumPy generator at the start of the named stream."""
    return np.random.default_rng(stream_seed(seed, purpose, *key))


@contextmanager
def torch_stream(seed: int, purpose: str, *key: str | int) -> Iterator[None]:
    """Run a block with torch's global generators at the start of the named stream (dropout draws from them); restore them after."""
    with global_generators(torch_generator(seed, purpose, *key)):
        yield


@contextmanager
def global_generators(source: torch.Generator) -> Iterator[None]:
    """Run a block with torch's global CPU generator in the state of ``source``, and those of GPUs seeded from it; restore them after."""
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(source.get_state())
        if devices:
            torch.cuda.manual_seed_all(int(torch.randint(2**62, (), generator=source)))
        yield


class Turns:
    """Several users of torch's global generators, each with a stream of its own, who take turns.

    Args:
        sources: one a user; in the state in which its stream begins.

    Attributes:
        cpu: each user's generator for what is drawn on the CPU, where its stream stands; to draw from it is to take a turn.
    """

    def __init__(self, sources: Sequence[torch.Generator]) -> None:
        self.cpu: list[torch.Generator] = []
        self._others: list[list[torch.Tensor]] = []
        for source in sources:
            with global_generators(source):
                cpu, *others = generator_states()
            self.cpu.append(torch.Generator().set_state(cpu))
            self._others.append(others)

    @contextmanager
    def turn(self, user: int) -> Iterator[None]:
        """Run a block with the global generators where this user has left them; put them back after."""
        here = generator_states()
        _restore([self.cpu[user].get_state(), *self._others[user]])
        try:
            yield
            cpu, *self._others[user] = generator_states()
            self.cpu[user].set_state(cpu)
        finally:
            _restore(here)


def generator_states() -> list[torch.Tensor]:
    """Return the states of torch's global generators, the CPU's first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
