"""FFA-LoRA (Sun et al. 2024, arXiv:2403.12313): LoRA whose A stays as it was drawn, so that the mean of B is exact.

Under noise it is exact too: ``Σ w_i (B_i + N_i) A``, where noise on both factors of LoRA is multiplied with itself.
"""

from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(name="ffa_lora", roles=(Role("B"), Role("A", learns=NEVER, down="log")), starts={"random": from_shapes(random_lora)})
