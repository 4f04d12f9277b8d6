"""Attention of clients side by side is that of each alone, whatever hides the padding and however a model uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedsb.core.rng import Turns
from fedsb.stack.stack import Part, _OwnNumbers

HEADS, WIDTH, P = 2, 4, 0.3
Mask = Callable[[Sequence[Part], int], Tensor | None]


def hidden(parts: Sequence[Part], tokens: int) -> Tensor:
    """Return what each example must not see, (rows, 1, 1, tokens)."""
    return torch.cat([(torch.arange(tokens) >= part.length).expand(part.rows, 1, 1, tokens) for part in parts])


def yes_or_no(parts: Sequence[Part], tokens: int) -> Tensor | None:
    return ~hidden(parts, tokens)


def large(parts: Sequence[Part], tokens: int) -> Tensor | None:
    return torch.zeros(1, dtype=torch.double).masked_fill(hidden(parts, tokens), torch.finfo(torch.double).min)


def infinite_for_padding_altogether(parts: Sequence[Part], tokens: int) -> Tensor | None:
    """Padding sees nothing either."""
    hide = hidden(parts, tokens)
    return torch.zeros(1, dtype=torch.double).masked_fill(hide | hide.transpose(2, 3), -torch.inf)


def generators(parts: Sequence[Part]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(part.client) for part in parts]


def together(parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    with _OwnNumbers(Turns(generators(parts)), parts):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=P)


def alone(parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[Tensor]:
    out, unit = [], len(q) // sum(part.rows for part in parts)
    rows = [unit * part.rows for part in parts]
    masks = [None] * len(rows) if mask is None else torch.split(mask, rows)
    pieces = zip(parts, generators(parts), masks, *(torch.split(t, rows) for t in (q, k, v)), strict=True)
    for part, generator, own, *qkv in pieces:
        n = part.length
        cut = None if own is None else own[..., : n if own.shape[-2] > 1 else 1, :n]
        with torch.random.fork_rng():
            torch.set_rng_state(generator.get_state())
            out.append(F.scaled_dot_product_attention(*(t[:, :, :n] for t in qkv), attn_mask=cut, dropout_p=P))
    return out


def check(parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Outputs and gradients at the tokens that are there."""
    given = [t.clone().requires_grad_() for t in (q, k, v)]
    found = together(parts, *given, mask)
    wanted = alone(parts, *given, mask)
    unit = len(q) // sum(part.rows for part in parts)
    own = [piece[:, :, : w.shape[2]] for piece, w in zip(torch.split(found, [unit * part.rows for part in parts]), wanted, strict=True)]
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(*(torch.autograd.grad(sum(t.square().sum() for t in ts), given) for ts in (own, wanted)), strict=True):
        torch.testing.assert_close(one, other)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


@pytest.mark.parametrize("mask", [yes_or_no, large, infinite_for_padding_altogether])
@pytest.mark.parametrize("lengths", [(5, 5), (5, 3), (2, 5)])
def test_whatever_hides_the_padding(mask: Mask, lengths: tuple[int, int]) -> None:
    parts = [Part(i, 2 + i, n) for i, n in enumerate(lengths)]
    q, k, v = (draw(5, HEADS, max(lengths), WIDTH) + i for i in range(3))
    check(parts, q, k, v, mask(parts, max(lengths)))


def test_without_a_mask() -> None:
    parts = [Part(0, 1, 4), Part(1, 3, 4)]
    q, k, v = (draw(4, HEADS, 4, WIDTH) + i for i in range(3))
    check(parts, q, k, v, None)


def test_windows_of_an_example_in_the_first_dimension() -> None:
    parts = [Part(0, 1, 4), Part(1, 2, 4)]
    q, k, v = (draw(2 * 3, HEADS, 4, WIDTH) + i for i in range(3))
    check(parts, q, k, v, None)


def test_one_query_over_texts_of_unequal_length() -> None:
    parts = [Part(0, 2, 3), Part(1, 1, 5)]
    q, k, v = draw(3, HEADS, 1, WIDTH), draw(3, HEADS, 5, WIDTH), draw(3, HEADS, 5, WIDTH) + 1
    check(parts, q, k, v, yes_or_no(parts, 5))


def test_arguments_by_name() -> None:
    x = torch.ones(2, 1, 5, WIDTH)
    with _OwnNumbers(Turns(generators([Part(0, 1, 5), Part(1, 1, 5)])), [Part(0, 1, 5), Part(1, 1, 5)]):
        attended = F.scaled_dot_product_attention(query=x, key=x, value=x, dropout_p=P)
        dropped = F.dropout(input=x, p=P)
    assert attended.shape == dropped.shape == x.shape
    assert not torch.equal(dropped[0], dropped[1])
