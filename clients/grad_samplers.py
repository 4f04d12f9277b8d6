"""Per-example gradients of layers for which Opacus' own hooks do not hold; registered by importing this file.

They are taken in float32, also where a pass was in bfloat16 or float16, in which Opacus would add up an example's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn
from torch.nn import functional as F

from fedsb.adapters import NARROW


@register_grad_sampler(nn.Linear)  # type: ignore[untyped-decorator]
def linear(layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of weight and bias, (b, out, in) and (b, out)."""
    found: dict[nn.Parameter, Tensor] = compute_linear_grad_sample(layer, [_wide(activations[0])], _wide(backprops))
    return found


@register_grad_sampler(nn.LayerNorm)  # type: ignore[untyped-decorator]
def layer_norm(layer: nn.LayerNorm, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of weight and bias, where it has one (ModernBERT's have none): (b, …) each.

    Args:
        layer: trained in one of the two at least.
        activations: its input, (b, …, normalised).
        backprops: gradient of its output, of the same shape.
    """
    backprops = _wide(backprops)
    between = tuple(range(1, backprops.dim() - len(layer.normalized_shape)))
    found = {}
    if layer.weight.requires_grad:
        found[layer.weight] = F.layer_norm(_wide(activations[0]), layer.normalized_shape, eps=layer.eps) * backprops
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops
    return {p: t.sum(dim=between) if between else t for p, t in found.items()}


@register_grad_sampler(nn.Embedding)  # type: ignore[untyped-decorator]
def embedding(layer: nn.Embedding, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of a table, (b, tokens, width): none for the row of the padding, as torch has it."""
    found: dict[nn.Parameter, Tensor] = compute_embedding_grad_sample(layer, activations, _wide(backprops))
    if layer.padding_idx is not None:
        for gradient in found.values():
            gradient[:, layer.padding_idx] = 0.0
    return found


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in NARROW else t
