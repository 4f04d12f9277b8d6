"""Which models can be trained privately."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsb.core.errors import UserError
from fedsb.privacy.codes import SelfCheckFailed

MIXING: tuple[type[nn.Module], ...] = (_BatchNorm,)


def refuse_mixing_layers(model: nn.Module) -> None:
    """Hold that no layer lets one example of a batch change another's output, or gradients could not be clipped by example.

    Raises:
        UserError: one does, or might: a base that its folder holds quantised may scale activations over a whole batch.
    """
    if getattr(getattr(model, "config", None), "quantization_config", None):
        raise UserError(
            "the model's folder holds it quantised (quantization_config), by a method whose layers may look at all examples of a batch at "
            "once, so privacy.unit=example cannot hold; use one with plain weights, and model.quantize"
        )
    for name, module in model.named_modules():
        if isinstance(module, MIXING):
            raise UserError(
                f"'{name}' ({type(module).__name__}) mixes the examples of a batch, so privacy.unit=example cannot hold; "
                "use a model with LayerNorm or GroupNorm"
            )


def hold_unmixed(model: nn.Module) -> None:
    """Hold at the client what the server holds of a model: a node loads its own.

    Raises:
        SelfCheckFailed: ``examples``.
    """
    try:
        refuse_mixing_layers(model)
    except UserError as error:
        raise SelfCheckFailed("examples") from error
