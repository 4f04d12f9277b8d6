"""FedSVD (Lee et al. 2025, arXiv:2505.12805): LoRA whose A rests within a round and is made orthonormal anew between rounds."""

from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import from_shapes, random_lora

SPEC = AdapterSpec(name="fedsvd", roles=(Role("B"), Role("A", learns=NEVER)), starts={"random": from_shapes(random_lora)})
