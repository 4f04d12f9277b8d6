"""LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557): ``ΔW = s · B R A``, B and A orthonormal and frozen, only the r x r core R trained.

With ``init.kind=weight_svd`` it has the geometry of LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604).
"""

from __future__ import annotations

from functools import partial

import torch

from fedsb.adapters.families.lora import one_step
from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import cored, from_shapes, orthogonal, random_core, weight_svd
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State


def pair_of_one_step(found: State, kind: str, step: float, scale: float, gamma: float) -> State:
    """Return LoRA-One's pair, to be frozen, and a core between them from which the run starts where LoRA-One does.

    ``B = −U √(S / S_1)``, ``A = √(S / S_1) Vᵀ`` and ``R0 = I / γ``: the 1/γ of that start stands in the core, whose entries are what an
    optimiser moves. For the arguments see :func:`fedsb.adapters.families.lora.one_step`.
    """
    pair = one_step(found, kind, step, scale, gamma=1.0)
    return pair.merge(State({Name(name.module, "R"): torch.eye(len(values)) / gamma for name, values in found.pick("S").items()}))


def lora_sb(gamma: float | None = None) -> AdapterSpec:
    """Return the family.

    Args:
        gamma: by ``adapter.options.gamma``: with a start from the gradient B and A are LoRA-One's pair, one step of 1/γ down; None: they
            are orthonormal, and ``init.core`` says where the run starts.

    Raises:
        UserError: γ is not above 0.
    """
    if gamma is not None and not gamma > 0:
        raise UserError(f"adapter.options.gamma={gamma} is out of range; it must be above 0, or null for orthonormal B and A")
    return AdapterSpec(
        name="lora_sb",
        roles=(Role("B", learns=NEVER, down="log"), Role("R"), Role("A", learns=NEVER, down="log")),
        starts={
            "gradient": None,
            "weight_svd": weight_svd,
            "orthogonal": from_shapes(orthogonal),
            "random": from_shapes(random_core),
        },
        from_gradient=cored if gamma is None else partial(pair_of_one_step, gamma=gamma),
        configure=lora_sb,
    )


SPEC = lora_sb()
