"""LoRA (Hu et al. 2021, arXiv:2106.09685): ``ΔW = s · B A``, both factors trained; A starts random, B at zero."""

from fedsb.adapters.spec import AdapterSpec

SPEC = AdapterSpec(name="lora", factors=("B", "A"), trained=("B", "A"), frozen=(), starts=("random",))
