"""What stands beside a base, as one operation that a compiler does not look into: it changes from round to round, and code does not.

To a compiler nothing beside W0, factors of a rank, factors of another and a matrix are four programs.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_NUMBERS = count()
_PARTS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def registered(part: Any) -> Tensor:
    """Return a key for ``part.beside``, a tuple of float32 matrices whose product is (m, n); it holds as long as the part lives.

    It is a tensor (int64, on the CPU) because compiled code takes those as inputs: a number or a text it would be compiled for, and so for
    one model of a process.
    """
    number = next(_NUMBERS)
    _PARTS[number] = part
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("fedsb::through", mutates_args=())
def through(x: Tensor, key: Tensor, size: int, back: bool) -> Tensor:
    """Return ``D x`` (…, m) of float32 x (…, n), or ``Dᵀ x`` (…, n) of x (…, m) with ``back``; zeros where D is nothing.

    Args:
        x: what goes through.
        key: of :func:`registered`.
        size: the last dimension of what comes out.
        back: whether gradients go through.
    """
    matrices = _PARTS[int(key)].beside
    if not matrices:
        return x.new_zeros(*x.shape[:-1], size)
    for matrix in matrices if back else reversed(matrices):
        x = x @ (matrix if back else matrix.T)
    return x


@through.register_fake
def _shaped(x: Tensor, key: Tensor, size: int, back: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key, _, ctx.back = inputs
    ctx.save_for_backward(key)
    ctx.size = x.shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    (key,) = ctx.saved_tensors
    return through(gradient, key, ctx.size, not ctx.back), None, None, None


through.register_autograd(_backward, setup_context=_remember)
