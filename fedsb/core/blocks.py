"""Blocks of tensors: what a client of a smaller rank sees of a factor, and a mean over clients of whom some hold a block alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsb.core.state import Layout, Name, Packed, State, WeightedSum

NOTHING = Layout(())
Shape = tuple[int, ...]
Block = Callable[[str, Shape], tuple[slice, ...]]  # from a factor's role and a smaller shape of it to where that lies in the whole


def leading(role: str, shape: Shape) -> tuple[slice, ...]:
    """Return the place of the leading rows and columns: of rank r' the first r' columns of B, rows of A, and both of R."""
    return tuple(map(slice, shape))


@dataclass(frozen=True)
class Sight:
    """What a client sees of tensors that others see whole, or more of.

    Attributes:
        layout: the shapes that it sees; what is not there it sees whole.
        block: where they lie.
    """

    layout: Layout = NOTHING
    block: Block = leading

    @cached_property
    def _shapes(self) -> dict[Name, Shape]:
        return dict(self.layout.shapes)

    def of(self, name: Name, tensor: Tensor) -> Tensor:
        """Return what is seen of a tensor: a view, or the tensor itself."""
        shape = self._shapes.get(name, tensor.shape)
        return tensor if tensor.shape == shape else tensor[self.block(name.role, shape)]

    def state(self, whole: State) -> State:
        """Return what is seen of a state."""
        return State({name: self.of(name, t) for name, t in whole.items()})


WHOLE = Sight()


def embedded(part: Tensor, whole: Tensor, block: Block, role: str) -> Tensor:
    """Return ``part`` in its place in a tensor of the shape of ``whole``, zeros elsewhere; itself where it is as large."""
    if part.shape == whole.shape:
        return part
    filled = part.new_zeros(whole.shape)
    filled[block(role, tuple(part.shape))] = part
    return filled


class BlockMean:
    """A running weighted mean, entry by entry over those who hold the entry, in float64; memory of one state for each layout.

    Whole states alone have the mean of :class:`~fedsb.core.state.WeightedSum`, to the bit.

    Args:
        block: where the tensors of a smaller layout lie.
    """

    def __init__(self, block: Block = leading) -> None:
        self._block = block
        self._sums: dict[Layout, WeightedSum] = {}

    @property
    def total_weight(self) -> float:
        """Sum of all weights."""
        return sum(each.total_weight for each in self._sums.values())

    def add(self, state: State, weight: float) -> None:
        """Add one term, of any layout."""
        layout = state.layout if isinstance(state, Packed) else Layout.of(state)
        self._sums.setdefault(layout, WeightedSum()).add(state, weight)

    def mean(self, current: State) -> State:
        """Return ``Σ w_i x_i / Σ w_i`` in float64, both sums over who holds the entry.

        Args:
            current: the whole tensors: what is there where nobody holds it. None is needed for names that all hold alike.

        Raises:
            ValueError: nothing was added, or the weights sum to zero.
        """
        means = {layout: each.mean() for layout, each in self._sums.items()}
        if not means:
            raise ValueError("a mean needs at least one state")
        first = next(iter(means.values()))
        if len(means) == 1 and all(current.get(name, t).shape == t.shape for name, t in first.items()):
            return first
        return State({name: self._merged(name, current[name], means) for name in first})

    def _merged(self, name: Name, whole: Tensor, means: dict[Layout, State]) -> Tensor:
        total, weights = (torch.zeros(whole.shape, dtype=torch.float64) for _ in range(2))
        for layout, mean in means.items():
            place, weight = self._block(name.role, tuple(mean[name].shape)), self._sums[layout].total_weight
            total[place] += weight * mean[name]
            weights[place] += weight
        return torch.where(weights > 0, total / weights, whole.to("cpu", torch.float64))
