"""LoRA (Hu et al. 2021, arXiv:2106.09685): ``ΔW = s · B A``, both factors trained; A starts random, B at zero."""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(name="lora", roles=(Role("B"), Role("A")), starts={"random": from_shapes(random_lora)})
