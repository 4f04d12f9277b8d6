"""FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463): LoRA whose A is shared, and whose B each client trains and keeps for itself.

The classifier head stays at home as B does.
"""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora
from fedsb.core.state import HEAD

SPEC = AdapterSpec(
    name="fedsa_lora",
    roles=(Role("B", down="nothing", up=False, kept_by="client"), Role("A")),
    starts={"random": from_shapes(random_lora)},
    head=Role(HEAD, down="nothing", up=False, kept_by="client"),
)
