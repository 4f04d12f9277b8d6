"""LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557): ``ΔW = s · B R A``, B and A orthonormal and frozen, only the r x r core R trained.

With ``init.kind=weight_svd`` it has the geometry of LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604).
"""

from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import cored, from_shapes, orthogonal, random_core, weight_svd

SPEC = AdapterSpec(
    name="lora_sb",
    roles=(Role("B", learns=NEVER, down="log"), Role("R"), Role("A", learns=NEVER, down="log")),
    starts={
        "gradient": None,
        "weight_svd": weight_svd,
        "orthogonal": from_shapes(orthogonal),
        "random": from_shapes(random_core),
    },
    from_gradient=cored,
)
