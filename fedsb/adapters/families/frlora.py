"""FRLoRA (ICLR 2025, OpenReview e0rQRMUhs7): LoRA that starts as a part of W0, PiSSA's."""

from dataclasses import replace

from fedsb.adapters.families.lora import SPEC as LORA

STARTS = ("pissa", "olora", "random")
SPEC = replace(LORA, name="frlora", starts={kind: LORA.starts[kind] for kind in STARTS}, from_gradient=None, configure=None)
