"""LoRA (Hu et al. 2021, arXiv:2106.09685): ``ΔW = s · B A``, both factors trained; A starts random, B at zero.

With ``init.kind=gradient`` it starts as LoRA-One does (Zhang, Liu and Chen 2025, arXiv:2502.01235): one step down the gradient, of rank r.
"""

from __future__ import annotations

from functools import partial

from fedsb.adapters.principal import for_scale, olora, pissa, whatever_scale
from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora
from fedsb.core.errors import UserError
from fedsb.core.state import Name, State

GAMMA = 128.0


def one_step(found: State, kind: str, step: float, scale: float, gamma: float = GAMMA) -> State:
    """Return LoRA-One's B and A: ``B = −U √(S / S_1) / √γ`` and ``A = √(S / S_1) Vᵀ / √γ`` of the gradient's leading SVD ``U S Vᵀ``.

    So ``s B A = −(s / (γ S_1)) [G]_r``, and W0 is not changed: the run starts away from it. (The formula of the published code; its
    README's has neither root nor S_1.)

    Args:
        found: ``B`` = U (m, r), ``S`` (r,) and ``A`` = Vᵀ (r, n) of each module.
        kind: not used: there is no core.
        step: not used: γ says how far it goes.
        scale: not used: s is not divided out.
        gamma: γ, ``stable_gamma`` in the published code.
    """
    tensors = {}
    for name, values in found.pick("S").items():
        # A gradient that is zero, as of a layer that nothing reaches, leads nowhere.
        root = (values / values[0].clamp(min=1e-30) / gamma).clamp(min=0.0).sqrt()
        tensors[Name(name.module, "B")] = -found[Name(name.module, "B")] * root
        tensors[Name(name.module, "A")] = root[:, None] * found[Name(name.module, "A")]
    return State(tensors)


def lora(gamma: float = GAMMA) -> AdapterSpec:
    """Return the family; ``gamma`` is γ of a start from the gradient, by ``adapter.options.gamma``.

    Raises:
        UserError: γ is not above 0.
    """
    if not gamma > 0:
        raise UserError(f"adapter.options.gamma={gamma} is out of range; it must be above 0")
    return AdapterSpec(
        name="lora",
        roles=(Role("B"), Role("A")),
        starts={"random": from_shapes(random_lora), "gradient": None, "pissa": pissa, "olora": olora},
        shifting={"pissa": for_scale, "olora": whatever_scale},
        from_gradient=partial(one_step, gamma=gamma),
        configure=lora,
    )


SPEC = lora()
