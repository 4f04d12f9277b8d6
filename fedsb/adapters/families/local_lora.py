"""LoRA of which each client keeps all: what a client reaches alone, the baseline of every personalised method."""

from fedsb.adapters.spec import AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora
from fedsb.core.state import HEAD

SPEC = AdapterSpec(
    name="local_lora",
    roles=(Role("B", down="nothing", up=False, kept_by="client"), Role("A", down="nothing", up=False, kept_by="client")),
    starts={"random": from_shapes(random_lora)},
    head=Role(HEAD, down="nothing", up=False, kept_by="client"),
)
