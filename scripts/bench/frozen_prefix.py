"""Compute what lies below the first adapted layer of a BERT once a text: a benchmark of hundreds of runs sees the same texts each time.

The layers below the adapters are frozen, so but for dropout their output is the same in every round, run and method. Here they run without
dropout and their output is kept; the layers from the first adapted one on run as ever.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedsb.models.adapted import AdaptedModel

# (layers below, token ids) -> hidden states (tokens, width). One pretrained model a process, or the states of two would be mixed.
_KNOWN: dict[tuple[int, tuple[int, ...]], Tensor] = {}
PAD = 0  # of BERT's vocabularies


def remember_prefix(adapted: AdaptedModel) -> None:
    """Let ``adapted.model`` look up the output of its frozen embeddings and lower layers, in place.

    Args:
        adapted: a BERT classifier whose adapters sit on layers ``….encoder.layer.<n>.…``; without adapters all layers are looked up.
    """
    network: Any = adapted.model
    body = getattr(network, network.base_model_prefix)
    if isinstance(body.embeddings, _Prefix):
        return
    layers = list(body.encoder.layer)
    adapted_at = [int(found.group(1)) for name in adapted.layers if (found := re.search(r"\.layer\.(\d+)\.", name))]
    lower = layers[: min(adapted_at, default=len(layers))]
    body.embeddings = _Prefix(body.embeddings, lower)
    for layer in lower:
        layer.forward = _pass


def _pass(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden


class _Prefix(nn.Module):
    """In the place of the embeddings: token ids to the hidden states that the first adapted layer takes."""

    def __init__(self, embeddings: nn.Module, lower: list[nn.Module]) -> None:
        super().__init__()
        self.embeddings = embeddings
        # Their class's forward, for theirs is told to pass; and in no list of modules, which would register their weights twice.
        self._lower = [partial(type(layer).forward, layer) for layer in lower]
        self._below: list[nn.Module] = [module for part in (embeddings, *lower) for module in part.modules()]

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None = None, **_: Any) -> Tensor:
        """Return (batch, tokens, width); zeros at padding, which the layers above mask out."""
        depth = len(self._lower)
        rows = [tuple(row[row != PAD].tolist()) for row in input_ids]
        new = sorted({row for row in rows if (depth, row) not in _KNOWN}, key=len)
        for _length, alike in groupby(new, key=len):
            batch = list(alike)
            _KNOWN.update(zip([(depth, row) for row in batch], self._computed(torch.tensor(batch)), strict=True))
        found = pad_sequence([_KNOWN[depth, row] for row in rows], batch_first=True)
        return nn.functional.pad(found, (0, 0, 0, input_ids.shape[1] - found.shape[1]))

    @torch.no_grad()
    def _computed(self, input_ids: Tensor) -> Tensor:
        # The model is told to train before every round, and with it what lies here.
        for module in self._below:
            module.training = False
        hidden: Tensor = self.embeddings(input_ids=input_ids)
        for layer in self._lower:
            hidden = layer(hidden, None)
        return hidden
