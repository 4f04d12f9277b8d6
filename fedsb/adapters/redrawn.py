"""Components of rank one that add nothing to the weights and that anybody can draw: they need not travel.

A product that is cut to p of r components leaves r − p columns of B at zero. Beside each stands a row of A of signs times one power of two,
drawn for the round, so that the component has a gradient; the power of two next to 1/√n, so that its norm is between 0.7 and 1.5, and every
wire carries it as it is. What is sent is the leading p columns and rows, whole where somebody has changed the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, Name, State


@dataclass(frozen=True)
class Redrawn:
    """The components that are drawn behind one round.

    Attributes:
        seed: of the run.
        round: behind which the server made the state.
    """

    seed: int
    round: int

    def rows(self, module: str, shape: Sequence[int]) -> Tensor:
        """Return rows of A in float32, (r, n) with r the server's rank: ``±2^k``, 2^k next to 1/√n."""
        signs = torch.randint(0, 2, tuple(shape), generator=torch_generator(self.seed, "redrawn", self.round, module))
        return (2.0 * signs - 1) * 2.0 ** round(-math.log2(shape[-1]) / 2)

    def ranks(self, state: State) -> dict[str, int]:
        """Return of each module how many leading components must be sent, at least one: the others are what :meth:`rows` draws."""
        return {name.module: self._rank(name.module, a, state[Name(name.module, "B")]) for name, a in state.items() if name.role == "A"}

    def _rank(self, module: str, a: Tensor, b: Tensor) -> int:
        alive = (a != self.rows(module, a.shape)).any(1) | (b != 0).any(0)
        return max(1, 1 + int(alive.nonzero().max())) if bool(alive.any()) else 1

    def completed(self, short: State, whole: Mapping[str, Sequence[int]], layout: Layout) -> State:
        """Return a state with the components that were not sent.

        Args:
            short: as it was sent.
            whole: by module, the shape of A at the server.
            layout: what the client is to hold.
        """
        shapes = dict(layout.shapes)
        return State({name: self._filled(name, t, shapes[name], whole) for name, t in short.items()})

    def _filled(self, name: Name, t: Tensor, shape: Sequence[int], whole: Mapping[str, Sequence[int]]) -> Tensor:
        if t.shape == tuple(shape):
            return t
        if name.role == "A":
            return torch.cat([t, self.rows(name.module, whole[name.module])[len(t) : shape[0]].to(t.dtype)])
        return torch.cat([t, t.new_zeros(len(t), shape[1] - t.shape[1])], dim=1)


def shortened(layout: Layout, ranks: Mapping[str, int]) -> Layout:
    """Return a layout with the leading components alone of A and B of each module."""
    return Layout(tuple((name, _short(name, shape, ranks)) for name, shape in layout.shapes))


def _short(name: Name, shape: tuple[int, ...], ranks: Mapping[str, int]) -> tuple[int, ...]:
    rank = ranks.get(name.module)
    if rank is None or name.role not in ("A", "B"):
        return shape
    return (min(rank, shape[0]), *shape[1:]) if name.role == "A" else (shape[0], min(rank, shape[1]))
