"""Faults on purpose: a simulated client that stays away, crashes, comes late, or sends what nobody can use; who and when follows the seed.

What is injected is what really happens: a crash is an exception out of the optimiser's step, with everything that was charged before it; a
damaged reply goes over the wire. The server's own checks meet them, and count them among the round's failures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedsb.config.schema import FaultConfig
from fedsb.core.rng import numpy_generator

LATEST_CRASH = 10  # steps; a crash that is drawn comes before the one after it
BFLOAT16_NAN = 0x7FC0


class InjectedFault(RuntimeError):
    """The configuration asked for this failure."""


@dataclass(frozen=True)
class Faults:
    """What happens to one client in one round."""

    dropout: bool
    crash_step: int | None
    delay: float
    corrupt: bool
    nan: bool

    @property
    def any(self) -> bool:
        """Whether anything happens at all."""
        return self.dropout or self.crash_step is not None or self.delay > 0 or self.corrupt or self.nan


def drawn(faults: FaultConfig, *, seed: int, client: str, round_number: int) -> Faults:
    """Draw a client's faults of a round. Every kind has its own draw: to turn one on changes nothing about the others."""

    def happens(kind: str) -> tuple[bool, np.random.Generator]:
        generator = numpy_generator(seed, "fault", kind, client, round_number)
        return bool(generator.random() < getattr(faults, kind)), generator

    crashes, step = happens("crash")
    late, time_ = happens("straggle")
    return Faults(
        dropout=happens("dropout")[0],
        crash_step=(faults.crash_step or int(step.integers(1, LATEST_CRASH + 1))) if crashes else None,
        delay=float(time_.exponential(faults.delay)) if late else 0.0,
        corrupt=happens("corrupt")[0],
        nan=happens("nan")[0],
    )


def suffer(faults: Faults, answer: Callable[[], Message]) -> Message:
    """Return what a client answers under its faults.

    Raises:
        InjectedFault: it does not.
    """
    if faults.dropout:
        raise InjectedFault("stayed away (faults.dropout)")
    time.sleep(faults.delay)
    with nullcontext() if faults.crash_step is None else crash_at(faults.crash_step):
        reply = answer()
    for happens, harm in ((faults.nan, _with_nan), (faults.corrupt, _cut)):
        if happens:
            _harm(reply, harm)
    return reply


@contextmanager
def crash_at(step: int) -> Iterator[None]:
    """Fail after so many steps of any optimiser inside the block, or at its end where there are fewer."""
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == step:
            raise InjectedFault(f"crashed after step {step} (faults.crash)")

    handle = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        handle.remove()
    raise InjectedFault(f"crashed after its last step, {done} (faults.crash)")


def _harm(reply: Message, harm: Callable[[Array], Array]) -> None:
    """Harm the first array of a reply, if it has one."""
    for key, record in reply.content.array_records.items():
        first = next(iter(record), None)
        if first is not None:
            reply.content[key] = ArrayRecord({**record, first: harm(record[first])})
            return


def _with_nan(array: Array) -> Array:
    values = np.array(array.numpy())
    values.reshape(-1)[:1] = math.nan if values.dtype == np.float32 else BFLOAT16_NAN
    return Array(values)


def _cut(array: Array) -> Array:
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=array.data[:-4])
