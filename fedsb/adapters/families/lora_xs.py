"""LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604): LoRA-SB's geometry between W0's leading singular vectors, which everybody computes.

Unlike in the published code B and A are both orthonormal, and R begins as zero and not as N(0, 1e-5²).
"""

from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import weight_svd

SPEC = AdapterSpec(
    name="lora_xs",
    roles=(Role("B", learns=NEVER, down="start"), Role("R"), Role("A", learns=NEVER, down="start")),
    starts={"weight_svd": weight_svd},
)
