"""LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557): ``ΔW = s · B R A``, B and A orthonormal and frozen, only the r x r core R trained.

With ``init.kind=weight_svd`` it has the geometry of LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604).
"""

from fedsb.adapters.spec import AdapterSpec

SPEC = AdapterSpec(
    name="lora_sb",
    factors=("B", "R", "A"),
    trained=("R",),
    frozen=("B", "A"),
    starts=("gradient", "weight_svd", "orthogonal", "random"),
)
