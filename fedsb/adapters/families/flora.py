"""FLoRA (Wang et al. 2024, arXiv:2409.05976): LoRA whose factors begin anew in each round, beside weights that hold all earlier ones.

The round's start is drawn from the seed by every client for itself, and costs no bytes.
"""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(
    name="flora",
    roles=(Role("B", down="nothing", kept_by="nobody"), Role("A", down="nothing", kept_by="nobody")),
    starts={"random": from_shapes(random_lora)},
)
