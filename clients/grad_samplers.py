"""Per-example gradients of layers for which Opacus' own hooks do not hold; registered by importing this file."""

from __future__ import annotations

from collections.abc import Sequence

from opacus.grad_sample import register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from torch import Tensor, nn
from torch.nn import functional as F


@register_grad_sampler(nn.LayerNorm)  # type: ignore[untyped-decorator]
def layer_norm(layer: nn.LayerNorm, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of weight and bias, where it has one (ModernBERT's have none): (b, …) each.

    Args:
        layer: trained in one of the two at least.
        activations: its input, (b, …, normalised).
        backprops: gradient of its output, of the same shape.
    """
    between = tuple(range(1, backprops.dim() - len(layer.normalized_shape)))
    found = {}
    if layer.weight.requires_grad:
        found[layer.weight] = F.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps) * backprops
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = backprops
    return {p: t.sum(dim=between) if between else t for p, t in found.items()}


@register_grad_sampler(nn.Embedding)  # type: ignore[untyped-decorator]
def embedding(layer: nn.Embedding, activations: Sequence[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of a table, (b, tokens, width): none for the row of the padding, as torch has it."""
    found: dict[nn.Parameter, Tensor] = compute_embedding_grad_sample(layer, activations, backprops)
    if layer.padding_idx is not None:
        for gradient in found.values():
            gradient[:, layer.padding_idx] = 0.0
    return found
