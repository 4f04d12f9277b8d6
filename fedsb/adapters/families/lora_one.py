"""LoRA-One (Zhang, Liu and Chen 2025, arXiv:2502.01235): LoRA whose first choice is the start that :mod:`.lora` makes of a gradient."""

from __future__ import annotations

from dataclasses import replace

from fedsb.adapters.families.lora import GAMMA, lora
from fedsb.adapters.spec import AdapterSpec


def lora_one(gamma: float = GAMMA) -> AdapterSpec:
    """Return the family; ``gamma`` is γ, by ``adapter.options.gamma``."""
    spec = lora(gamma)
    return replace(spec, name="lora_one", starts={"gradient": None, "random": spec.starts["random"]}, configure=lora_one)


SPEC = lora_one()
