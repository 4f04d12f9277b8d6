"""What is done to gradients before an optimiser sees them, and after the noise of private ones: public functions of the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedsb.adapters.tails import tails
from fedsb.config.schema import TrainConfig
from fedsb.core.state import Name

DELTA = 1e-6
LEAST = 1e-30  # of a norm that is divided by
Precondition = Callable[[], None]
Factors = Mapping[Name, nn.Parameter]


def nothing() -> None:
    """Leave gradients as they are."""


def before_steps(train: TrainConfig, trained: Factors) -> Precondition:
    """Return what to do to the gradients of ``trained`` before each step: a penalty is added to them, then they are preconditioned."""
    precondition = preconditioner(train.preconditioner, trained)
    share, weight = train.tail_share, train.tail_penalty
    if share is None or not weight:
        return precondition

    def apply() -> None:
        _penalise(trained, share, weight)
        precondition()

    return apply


def _penalise(trained: Factors, share: float, weight: float) -> None:
    """Add the gradient of ``λ Σ ‖B_t‖_F ‖A_t‖_F``, with B_t, A_t the tails of each module, by hand: no reported loss has it in it."""
    reached = {name: p.grad for name, p in trained.items() if p.grad is not None}
    whole = [name for name in reached if all(Name(name.module, role) in reached for role in "AB")]
    values, gradients = {name: trained[name].detach() for name in whole}, {name: reached[name] for name in whole}
    for (b, a), (to_b, to_a) in zip(tails(values, share), tails(gradients, share), strict=True):
        below, above = torch.linalg.vector_norm(b), torch.linalg.vector_norm(a)
        # At zero the norm's subgradient of least norm is zero. No value is read off the device.
        to_b.add_(b / below.clamp_min(LEAST) * (weight * above))
        to_a.add_(a / above.clamp_min(LEAST) * (weight * below))


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
