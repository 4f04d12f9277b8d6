"""A language model's logits at some places of a batch alone: what it says behind a prompt's tokens is neither learnt nor measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def logits_at(places: Tensor, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits at some places, (places, vocabulary), equal to those of a whole pass.

    Where the model's output projection is given the hidden states of the batch, it is given those of the places: product, logits and their
    gradient are as much smaller. Where it is not (a model that multiplies by its embedding itself), all are made and the others dropped.

    Args:
        places: indices into (batch · tokens,), each once, on the device of the model.
        model: of transformers, with logits of (batch, tokens, vocabulary).
        inputs: its arguments; ``input_ids`` (batch, tokens) among them.
    """
    shape = inputs["input_ids"].shape

    def narrow(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = given[0]
        return (hidden.flatten(0, 1).index_select(0, places)[None], *given[1:]) if hidden.shape[:2] == shape else given

    projection: nn.Module | None = model.get_output_embeddings()
    hook = None if projection is None else projection.register_forward_pre_hook(narrow)
    try:
        logits: Tensor = model(**inputs).logits.flatten(0, 1)
    finally:
        if hook is not None:
            hook.remove()
    return logits if len(logits) == len(places) else logits.index_select(0, places)
