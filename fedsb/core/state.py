"""Named tensors and their algebra: what a client trains, sends and receives.

A :class:`State` maps ``Name(module, role)`` to a tensor. Roles are the factors of a low-rank adapter (``A``, ``R``, ``B``),
``head`` for trained parameters outside the adapters, or the names of intermediate results (``Y``, ``Z``, …). Iteration order is
always sorted by module, then role, so packing, hashing and summing never depend on how a state was built.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEAD = "head"
TRAINED = "trained"
MASKED, SEALED = "masked", "sealed"  # of a secure sum: words modulo 2^32, and bytes that the server passes on
_ALONE = (HEAD, MASKED, SEALED)  # roles that are groups of their own
LINE = 64  # bytes of a cache line, where torch's own memory begins
PIECE = 2**16  # values of a sum that are widened at a time


class Name(NamedTuple):
    """Where a tensor belongs: the dotted name of the module (or of the parameter, for the head) and its role there."""

    module: str
    role: str


class State(Mapping[Name, Tensor]):
    """An immutable mapping from :class:`Name` to tensor, iterated in sorted order. Tensors are not copied."""

    __slots__ = ("_tensors",)
    _tensors: dict[Name, Tensor]

    def __init__(self, tensors: Mapping[Name, Tensor] | Iterable[tuple[Name, Tensor]] = ()) -> None:
        items: dict[Name, Tensor] = dict(tensors)
        self._tensors = {Name(*name): items[name] for name in sorted(items)}

    def __getitem__(self, name: Name) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"State({len(self)} tensors, {self.numel} values)"

    @property
    def numel(self) -> int:
        """Number of values over all tensors."""
        return sum(t.numel() for t in self.values())

    @property
    def modules(self) -> list[str]:
        """Sorted names of the modules that hold an adapter factor (the head is not among them)."""
        return sorted({name.module for name in self if name.role != HEAD})

    def pick(self, *roles: str) -> State:
        """Return the part with one of ``roles``."""
        return State({name: t for name, t in self.items() if name.role in roles})

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """Apply ``function`` to every tensor."""
        return State({name: function(t) for name, t in self.items()})

    def merge(self, other: State) -> State:
        """Return the union; a name in both takes the tensor of ``other``."""
        return State({**self._tensors, **other._tensors})


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a state, by wire group; two sides that agree on it can exchange flat arrays."""

    shapes: tuple[tuple[Name, tuple[int, ...]], ...]

    @classmethod
    def of(cls, state: State) -> Layout:
        """Read the layout off a state."""
        return cls(tuple((name, tuple(t.shape)) for name, t in state.items()))

    @cached_property
    def digest(self) -> int:
        """A 48-bit fingerprint: it fits an integer metric of a Flower record on every platform."""
        text = ";".join(f"{n.module}/{n.role}:{'x'.join(map(str, s))}" for n, s in self.shapes)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")

    @cached_property
    def groups(self) -> dict[str, tuple[tuple[Name, tuple[int, ...]], ...]]:
        """The entries by group, ``trained`` and ``head`` (or those of a secure sum); an empty group is left out."""
        split: dict[str, list[tuple[Name, tuple[int, ...]]]] = {}
        for name, shape in self.shapes:
            split.setdefault(name.role if name.role in _ALONE else TRAINED, []).append((name, shape))
        return {group: tuple(entries) for group, entries in sorted(split.items())}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of values by group."""
        return {group: sum(math.prod(shape) for _, shape in entries) for group, entries in self.groups.items()}

    @property
    def numel(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    def difference(self, other: Layout) -> str | None:
        """Say in words where ``other`` first differs from this layout, or None where it does not."""
        mine, theirs = dict(self.shapes), dict(other.shapes)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"{name.role} of '{name.module}' is {theirs.get(name, 'absent')}, expected {mine.get(name, 'absent')}"
        return None


class Packed(State):
    """A state that lies in one flat tensor a group, as it travels; its tensors are views of those, cut when somebody asks for one."""

    __slots__ = ("_cut", "flats", "layout")

    def __init__(self, flats: Mapping[str, Tensor], layout: Layout) -> None:
        self.flats = flats
        self.layout = layout
        self._cut: dict[Name, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.flats, self.layout)

    @property
    def _tensors(self) -> dict[Name, Tensor]:  # type: ignore[override]
        if self._cut is None:
            parts = {
                name: part.view(shape)
                for group, entries in self.layout.groups.items()
                for (name, shape), part in zip(entries, torch.split(self.flats[group], [math.prod(s) for _, s in entries]), strict=True)
            }
            self._cut = {name: parts[name] for name in sorted(parts)}
        return self._cut


def pack(state: State) -> dict[str, Tensor]:
    """Concatenate a state into one flat tensor per group (``trained``, ``head``), in sorted order."""
    if isinstance(state, Packed):
        return dict(state.flats)
    return {group: torch.cat([state[name].reshape(-1) for name, _ in entries]) for group, entries in Layout.of(state).groups.items()}


def unpack(flats: Mapping[str, Tensor], layout: Layout) -> Packed:
    """Undo :func:`pack`; the tensors are views of ``flats``.

    Raises:
        ValueError: a group is missing or superfluous, or its number of values does not fit the layout.
    """
    groups = layout.groups
    if groups.keys() != flats.keys():
        raise ValueError(f"groups are {sorted(flats)}, expected {sorted(groups)}")
    for group, expected in layout.sizes.items():
        if flats[group].numel() != expected:
            raise ValueError(f"group '{group}' holds {flats[group].numel()} values, expected {expected}")
    return Packed(flats, layout)


def laid_out(tensor: Tensor) -> Tensor:
    """Return a tensor that lies as torch would lay it, row by row from a cache line on; a copy only where it lies otherwise.

    The last bits of a product depend on how its operands lie.
    """
    regular = tensor.is_contiguous() and tensor.data_ptr() % LINE == 0
    return tensor if regular else tensor.clone(memory_format=torch.contiguous_format)


def squared_norm(state: State) -> float:
    """Sum of squares over all values, in float64."""
    return sum(float(t.double().square().sum()) for t in state.values())


def subtract(left: State, right: State) -> State:
    """Return ``left - right`` name by name."""
    return State({name: t - right[name] for name, t in left.items()})


def non_finite(state: State) -> Name | None:
    """Return the first name whose tensor holds NaN or infinity, or None."""
    return next((name for name, t in state.items() if not bool(torch.isfinite(t).all())), None)


def sha256(*states: State) -> str:
    """Hash states as float32 little-endian bytes in sorted order, one state after the other."""
    digest = hashlib.sha256()
    for state in states:
        for t in state.values():
            digest.update(t.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


class WeightedSum:
    """A running ``Σ w_i x_i`` of states in float64; memory of one state whatever the number of terms."""

    def __init__(self) -> None:
        self.total_weight = 0.0
        self._layout: Layout | None = None
        self._sum: dict[str, Tensor] = {}

    def add(self, state: State, weight: float) -> None:
        """Add one term; the first fixes names and shapes."""
        layout = state.layout if isinstance(state, Packed) else Layout.of(state)
        if self._layout is None:
            self._layout = layout
        elif layout is not self._layout and layout != self._layout:
            raise ValueError(f"states differ: {self._layout.difference(layout)}")
        for group, flat in pack(state).items():
            if group in self._sum:
                self._widen(self._sum[group], flat.detach(), weight)
            else:
                self._sum[group] = flat.detach().to("cpu", torch.float64, copy=True).mul_(weight)
        self.total_weight += weight

    @staticmethod
    def _widen(total: Tensor, term: Tensor, weight: float) -> None:
        """Add in pieces that stay in the cache: a widened copy of the whole would cost more time than the sum, and as much memory."""
        for i in range(0, len(term), PIECE):
            total[i : i + PIECE].add_(term[i : i + PIECE].to("cpu", torch.float64), alpha=weight)

    def mean(self) -> State:
        """Return ``Σ w_i x_i / Σ w_i`` in float64.

        Raises:
            ValueError: nothing was added, or the weights sum to zero.
        """
        if self._layout is None or self.total_weight <= 0:
            raise ValueError("a mean needs at least one state with a positive weight")
        return unpack({group: t / self.total_weight for group, t in self._sum.items()}, self._layout)
