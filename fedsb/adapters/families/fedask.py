"""FedASK (arXiv:2507.09990): LoRA whose product reaches the server by two sketches in each round; both factors learn, or B alone."""

from __future__ import annotations

from fedsb.adapters.sketched import Sketched
from fedsb.adapters.spec import ALWAYS, NEVER, AdapterSpec, Role, chain_shapes
from fedsb.adapters.starts import from_shapes, random_lora
from fedsb.core.errors import UserError


def fedask(oversample: int = 8, freeze: bool = False) -> AdapterSpec:
    """Return the family.

    Args:
        oversample: columns of a sketch beyond the rank, by ``adapter.options.oversample``.
        freeze: whether A rests within a round, by ``adapter.options.freeze``: the mean is exact then, as of rank r.

    Raises:
        UserError: there are no such columns, or it is neither true nor false.
    """
    if type(oversample) is not int or oversample < 0:
        raise UserError(f"adapter.options.oversample={oversample} is no number of columns; use a whole number of at least 0")
    if type(freeze) is not bool:
        raise UserError(f"adapter.options.freeze={freeze} must be true or false")
    sketch = Sketched(oversample)
    return AdapterSpec(
        name="fedask",
        roles=(Role("B"), Role("A", learns=NEVER if freeze else ALWAYS)),
        starts={"random": from_shapes(random_lora)},
        shapes=lambda m, n, rank: {**chain_shapes(m, n, rank), **sketch.shapes(m, n, rank)},
        sketch=sketch,
        configure=fedask,
    )


SPEC = fedask()
