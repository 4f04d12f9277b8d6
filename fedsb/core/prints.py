"""A few numbers by which two parties tell whether they have computed the same tensors, without sending them.

Bits are no measure: processors round otherwise, so that a hash differs where nothing does. The products of random projections differ as the
tensors do: by rounding, or by as much as a singular vector that was taken for its neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedsb.core.rng import torch_generator
from fedsb.core.state import State, squared_norm

PROBES = 8
# Of the norm. Without AVX an exact SVD differs by 1e-10 and by some bit in one factor of nine, subspace iteration in float32 by 5e-6 where
# singular values lie as close as those of Gaussian noise; one column among 10000 that points elsewhere makes 1e-2.
ALIKE = 1e-4


def prints(state: State, seed: int) -> tuple[float, ...]:
    """Return ``Σ u_kᵀ F v_k / ‖state‖`` over its tensors F for k = 1 … 8, with u_k, v_k standard normal, drawn from the seed; () for none.

    A difference D of states, of one norm, moves each by a number of mean zero and variance ``‖D‖² / ‖state‖²``.
    """
    if not len(state):
        return ()
    total = torch.zeros(PROBES, dtype=torch.float64)
    for name, tensor in state.items():
        matrix = tensor.reshape(-1, tensor.shape[-1]).double()
        stream = torch_generator(seed, "prints", name.module, name.role)
        left, right = (torch.randn(size, PROBES, generator=stream, dtype=torch.float64) for size in matrix.shape)
        total += ((matrix.T @ left) * right).sum(dim=0)
    return tuple((total / squared_norm(state) ** 0.5).tolist())


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Estimate ``‖D‖ / ‖state‖`` from two prints; infinite where they are not of one kind."""
    if len(one) != len(other):
        return math.inf
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / max(1, len(one)))
