"""The adapter families, one file each, by name."""

from fedsb.adapters.families import fedsa_lora, ffa_lora, flora, head_only, lora, lora_sb, rolora
from fedsb.adapters.spec import AdapterSpec

SPECS: dict[str, AdapterSpec] = {
    spec.name: spec for spec in (lora.SPEC, lora_sb.SPEC, ffa_lora.SPEC, fedsa_lora.SPEC, flora.SPEC, rolora.SPEC, head_only.SPEC)
}

__all__ = ["SPECS"]
