"""What is done to gradients before an optimiser sees them, and after the noise of private ones: a public function of the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedsb.core.state import Name

DELTA = 1e-6
Precondition = Callable[[], None]
Factors = Mapping[Name, nn.Parameter]


def nothing() -> None:
    """Leave gradients as they are."""


def preconditioner(kind: str, trained: Factors) -> Precondition:
    """Return what to do to the gradients of ``trained`` before each step; ``kind`` is a key of :data:`KINDS`."""
    return KINDS[kind](trained)


def _riemannian(trained: Factors) -> Precondition:
    """``∇B (A Aᵀ + δI)⁻¹`` and ``(Bᵀ B + δI)⁻¹ ∇A`` (Zhang and Pilanci 2024, arXiv:2402.02347; LoRA-One, equation 9), δ = 1e-6.

    Both with the factors as they are before the step. Where B is zero A's gradient is, too; close to it the inverse is large, which an
    optimiser that normalises does not feel and plain SGD does.
    """
    pairs = [(b, trained[Name(name.module, "A")]) for name, b in trained.items() if name.role == "B"]

    def apply() -> None:
        for b, a in pairs:
            if a.grad is not None:
                a.grad = _solved(b.detach().T @ b.detach(), a.grad)
            if b.grad is not None:
                b.grad = _solved(a.detach() @ a.detach().T, b.grad.T).T.contiguous()

    return apply


def _solved(gram: Tensor, gradient: Tensor) -> Tensor:
    # In float64: δ is at the rounding level of a float32 Gram matrix.
    wide = gram.double() + DELTA * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    found: Tensor = torch.linalg.solve(wide, gradient.double())
    return found.to(gradient.dtype)


KINDS: Mapping[str, Callable[[Factors], Precondition]] = {"none": lambda trained: nothing, "riemannian": _riemannian}
