"""RoLoRA (Chen et al. 2024, arXiv:2409.02346): LoRA whose factors learn in turns, B in odd rounds and A in even ones.

Both lie in the log, so that a client is sent no more than the factor that has moved since it was last asked.
"""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(
    name="rolora", roles=(Role("B", learns=0, down="log"), Role("A", learns=1, down="log")), starts={"random": from_shapes(random_lora)}
)
