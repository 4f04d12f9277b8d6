"""RAVAN (Raje et al. 2025, arXiv:2506.05568): ``ΔW = s Σ_h t_h B_h H_h A_h`` between frozen heads that everybody draws from the seed.

The cores H_h and the scalars t_h are trained, and ``t_h H_h`` goes up in the place of H_h: the mean of these is that of the weights, the
product of the means of t_h and of H_h is not. H begins the run as zero, t each round as 1.
"""

from __future__ import annotations

from functools import partial

from fedsb.adapters.heads import Heads, head_shapes, orthogonal_heads, scaled_cores, split
from fedsb.adapters.spec import NEVER, AdapterSpec, Role
from fedsb.adapters.starts import from_shapes
from fedsb.core.errors import UserError

ROLES = (
    Role("B", learns=NEVER, down="start"),
    Role("H", up=scaled_cores),
    Role("t", down="nothing", up=False, kept_by="nobody", rest=1.0),
    Role("A", learns=NEVER, down="start"),
)


def ravan(heads: int = 4) -> AdapterSpec:
    """Return the family.

    Args:
        heads: how many, by ``adapter.options.heads``; the rank is that of each.

    Raises:
        UserError: it is no number of heads.
    """
    if type(heads) is not int or heads < 1:
        raise UserError(f"adapter.options.heads={heads} is no number of heads; use a whole number of at least 1")
    return AdapterSpec(
        name="ravan",
        roles=ROLES,
        starts={"orthogonal": from_shapes(orthogonal_heads(heads))},
        shapes=partial(head_shapes, heads=heads),
        split=split,
        build=Heads,
        configure=ravan,
        reach=lambda rank: heads * rank,
    )


SPEC = ravan()
