"""What dropout multiplies by, drawn as torch's own dropout draws it, and faster where it can be."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from fedsb.rng import Turns

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
