"""What a classifier sees of a text: its model's own choice (a token, a pooler), or the mean of the last hidden states.

transformers knows no such option, so the mean is a hook on the pretrained body, and no file of a saved model can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from fedsb.core.errors import UserError


def pooling_remark(pooling: str, what: str) -> str:
    """Say what a model's files can't hold, and what to do on loading; empty for the model's own pooling."""
    if pooling == "own":
        return ""
    return f"model.pooling={pooling} stands in no file of a model: call fedsb.models.pool_by_mean(model) on what you load from {what}"


def pool_by_mean(network: nn.Module) -> None:
    """Let a sequence classifier see the mean of its body's last hidden states over the real tokens, in place.

    The body then says the mean at every position, and for its pooler where it has one. So every head sees it, whether it looks
    at the first token, at the last, or at what the pooler made. An example's mean is over its own tokens alone.

    Args:
        network: a sequence classifier of transformers, with or without adapters.

    Raises:
        UserError: its body is not to be found, or does not take an attention mask.
    """
    body = getattr(network, str(getattr(network, "base_model_prefix", "")), None)
    if not isinstance(body, nn.Module) or "attention_mask" not in signature(body.forward).parameters:
        raise UserError(f"model.pooling=mean needs a body that takes an attention mask, which {type(network).__name__} lacks; use own")
    body.register_forward_hook(_say_the_mean, with_kwargs=True)


def _say_the_mean(body: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    mask = signature(body.forward).bind_partial(*args, **kwargs).arguments.get("attention_mask")
    if not isinstance(output, ModelOutput) or not _fits(output, mask):
        raise UserError(f"model.pooling=mean can't read what {type(body).__name__} puts out, one vector a token; use model.pooling=own")
    hidden: Tensor = output["last_hidden_state"]
    mean = mean_of_tokens(hidden, mask)
    replaced = {"last_hidden_state": mean.unsqueeze(1).expand_as(hidden), "pooler_output": mean}
    # A new output, for the body's own may be held by someone else.
    return type(output)(**{key: replaced.get(key, value) for key, value in output.items()})


def _fits(output: ModelOutput, mask: Tensor | None) -> bool:
    hidden, pooled = output.get("last_hidden_state"), output.get("pooler_output")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or (mask is not None and mask.shape != hidden.shape[:2]):
        return False
    return pooled is None or pooled.shape == (hidden.shape[0], hidden.shape[2])


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average (batch, tokens, width) over the tokens whose mask isn't 0; in float32, also where autocast made ``hidden`` coarser."""
    if mask is None:
        return hidden.float().mean(1).to(hidden.dtype)
    real = mask.to(hidden.device).bool().unsqueeze(-1)
    # Filled and not multiplied: what a model computes at padding may be infinite.
    total = hidden.float().masked_fill(~real, 0.0).sum(1)
    return (total / real.sum(1).clamp(min=1)).to(hidden.dtype)
