"""Families whose product is no chain: what the walls around a geometry must let through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fedsb.adapters import SPECS, AdapterSpec
from fedsb.adapters.geometry import Shapes
from fedsb.adapters.spec import Role
from fedsb.adapters.starts import from_shapes
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State


def khatri_rao(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Split ``(B1 A1) ∘ (B2 A2)``: the columns of U are all products of a column of B1 and one of B2, entry by entry."""
    b1, a1, b2, a2 = factors
    left = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    right = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
    return left, right


def hadamard(second: int = 2) -> AdapterSpec:
    """Return ``ΔW = s (B1 A1) ∘ (B2 A2)``, the first pair of the run's rank, the second of one that ``adapter.options`` choose."""

    def shapes(m: int, n: int, rank: int) -> Shapes:
        return {"B1": (m, rank), "A1": (rank, n), "B2": (m, second), "A2": (second, n)}

    def start(layers: dict[str, tuple[int, int]], rank: int, seed: int) -> State:
        drawn = {}
        for module, (m, n) in layers.items():
            for role, shape in shapes(m, n, rank).items():
                stream = torch_generator(seed, "start", module, role)
                drawn[Name(module, role)] = torch.zeros(shape) if role == "B1" else torch.randn(shape, generator=stream) / shape[1] ** 0.25
        return State(drawn)

    roles = tuple(Role(name) for name in ("B1", "A1", "B2", "A2"))
    return AdapterSpec("hadamard", roles, {"random": from_shapes(start)}, shapes, khatri_rao, configure=hadamard)


class OneByOne(nn.Module):
    """``B R A x`` by a forward of its own, token by token as it were: what LoRA-SB computes, written otherwise."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.B, self.R, self.A = (nn.Parameter(torch.empty(shapes[role])) for role in "BRA")

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, n) to (…, m)."""
        return torch.einsum("mr,rs,sn,...n->...m", self.B, self.R, self.A, x)


def heads(number: int = 2) -> AdapterSpec:
    """Return ``ΔW = s Σ_h t_h B_h H_h A_h`` (RAVAN), B_h, A_h frozen: the scalars t_h begin each round as 1, ``t_h H_h`` is uploaded."""

    def shapes(m: int, n: int, rank: int) -> Shapes:
        return {"B": (number, m, rank), "H": (number, rank, rank), "t": (number,), "A": (number, rank, n)}

    def start(layers: dict[str, tuple[int, int]], rank: int, seed: int) -> State:
        drawn = {}
        for module, (m, n) in layers.items():
            for role, shape in shapes(m, n, rank).items():
                if role in "BA":
                    drawn[Name(module, role)] = torch.randn(shape, generator=torch_generator(seed, "start", module, role)) / rank
                elif role == "H":
                    drawn[Name(module, role)] = torch.zeros(shape)
        return State(drawn)

    def split(factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        b, h, t, a = factors
        return torch.cat([*(t[:, None, None] * b)], dim=1), torch.cat([*(h @ a)])

    roles = (
        Role("B", learns="never", down="log"),
        Role("H", up=lambda trained: trained["t"][:, None, None] * trained["H"]),
        Role("t", down="nothing", up=False, kept_by="nobody", rest=1.0),
        Role("A", learns="never", down="log"),
    )
    return AdapterSpec("heads", roles, {"orthogonal": from_shapes(start)}, shapes, split, configure=heads)


FAMILIES = {
    "hadamard": hadamard(),
    "own_forward": replace(SPECS["lora_sb"], name="own_forward", build=OneByOne, configure=None),
    "heads": heads(),
}
