"""What dropout multiplies by, drawn as torch's own dropout draws it, and faster where it can be; and how to do without."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fedsb.core.rng import Turns, global_generators

BITS = 53  # of a word of the generator, as many as a number in double precision has


def fill_noise(noise: Tensor, p: float, turns: Turns, user: int) -> None:
    """Fill with zeros (at rate ``p``) and ``1 / (1 - p)``, from a user's stream: what ``F.dropout`` multiplies by, bit for bit."""
    if noise.device.type != "cpu" or p == 1.0:
        with turns.turn(user):
            noise.copy_(F.dropout(torch.ones_like(noise), p))
    elif _words_are_known():
        noise.copy_(_kept(noise, 1 - p, turns.cpu[user])).div_(1 - p)
    else:
        noise.bernoulli_(1 - p, generator=turns.cpu[user]).div_(1 - p)


def _kept(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Draw ones where ``bernoulli_(share)`` does: it compares each word of the generator by itself, which takes half as long again."""
    words = torch.empty_like(like, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.bitwise_and_(2**BITS - 1).lt_(math.ceil(share * 2**BITS))


@cache
def _words_are_known() -> bool:
    """Tell whether this build of torch draws from the words in that way: on Intel's processors it has another one."""
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    usual = torch.empty(1_000, dtype=torch.int64).bernoulli_(0.9, generator=one)
    return torch.equal(usual, _kept(usual, 0.9, other))


class _Off(TorchFunctionMode):
    """Leaves out what dropout does."""

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = dict(kwargs or {})
        if function in DROPOUTS:
            return args[0] if args else given["input"]
        if function is F.scaled_dot_product_attention:
            args = [*args[:4], *([0.0] if len(args) > 4 else []), *args[5:]]
            given |= {"dropout_p": 0.0} if len(args) <= 4 else {}
        return function(*args, **given)


DROPOUTS = (F.dropout, F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout)
_OFF: ContextVar[bool] = ContextVar("dropout is off", default=False)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute without dropout inside the block, in training too; what else draws numbers draws the same ones each time, and spends none."""
    before = _OFF.set(True)
    try:
        with global_generators(torch.Generator().manual_seed(0)), _Off():
            yield
    finally:
        _OFF.reset(before)


def is_off() -> bool:
    """Tell whether the block is one of :func:`undisturbed`."""
    return _OFF.get()
