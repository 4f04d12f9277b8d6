"""FedSA-LoRA (Guo et al. 2024, arXiv:2410.01463): LoRA whose A is shared, and whose B each client trains and keeps for itself."""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(
    name="fedsa_lora",
    roles=(Role("B", down="nothing", up=False, kept_by="client"), Role("A")),
    starts={"random": from_shapes(random_lora)},
)
