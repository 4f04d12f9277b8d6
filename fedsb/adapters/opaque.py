"""What stands beside a base, as one operation that a compiler does not look into: it changes from round to round, and code does not.

To a compiler nothing beside W0, factors of a rank, factors of another and a matrix are four programs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Beside = Callable[[], tuple[Tensor, ...]]
_NUMBERS = count()
_PARTS: WeakValueDictionary[str, Any] = WeakValueDictionary()


def registered(part: Any) -> str:
    """Return a key for ``part.beside``, a tuple of float32 matrices whose product is (m, n); it holds as long as the part lives."""
    key = str(next(_NUMBERS))
    _PARTS[key] = part
    return key


@torch.library.custom_op("fedsb::through", mutates_args=())
def through(x: Tensor, key: str, size: int, back: bool) -> Tensor:
    """Return ``D x`` (…, m) of float32 x (…, n), or ``Dᵀ x`` (…, n) of x (…, m) with ``back``; zeros where D is nothing.

    Args:
        x: what goes through.
        key: of :func:`registered`.
        size: the last dimension of what comes out.
        back: whether gradients go through.
    """
    matrices = _PARTS[key].beside
    if not matrices:
        return x.new_zeros(*x.shape[:-1], size)
    for matrix in matrices if back else reversed(matrices):
        x = x @ (matrix if back else matrix.T)
    return x


@through.register_fake
def _shaped(x: Tensor, key: str, size: int, back: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], size)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.key, _, ctx.back = inputs
    ctx.size = x.shape[-1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return through(gradient, ctx.key, ctx.size, not ctx.back), None, None, None


through.register_autograd(_backward, setup_context=_remember)
