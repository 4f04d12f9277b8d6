"""The adapter families, one file each, by name."""

from fedsb.adapters.families import (
    abba,
    abba_alternating,
    abba_core,
    abba_masked,
    fedask,
    fedsa_lora,
    fedsvd,
    ffa_lora,
    flora,
    frlora,
    head_only,
    local_lora,
    lora,
    lora_one,
    lora_sb,
    lora_xs,
    ravan,
    rolora,
)
from fedsb.adapters.spec import AdapterSpec

FAMILIES = (
    lora,
    frlora,
    lora_one,
    lora_sb,
    lora_xs,
    ravan,
    fedsvd,
    fedask,
    ffa_lora,
    fedsa_lora,
    flora,
    rolora,
    abba,
    abba_masked,
    abba_alternating,
    abba_core,
    local_lora,
    head_only,
)
SPECS: dict[str, AdapterSpec] = {family.SPEC.name: family.SPEC for family in FAMILIES}

__all__ = ["SPECS"]
