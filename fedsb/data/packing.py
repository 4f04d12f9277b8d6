"""Several examples in one row: tokens end to end, without padding between them, and positions that begin anew with each.

Which examples make a batch is drawn as ever; packing says in how many rows a batch is computed, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsb.data.batches import Feature, pad_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rows(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Lay examples into rows, the longest first, each into the first row that has room (first-fit decreasing, Johnson 1973).

    Args:
        lengths: tokens of each example.
        tokens: tokens a row; an example that is longer has a row of its own.

    Returns:
        Indices of ``lengths``; every one stands in exactly one row.
    """
    laid: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((row for row, left in enumerate(room) if lengths[i] <= left), None)
        if fits is None:
            laid.append([i])
            room.append(max(0, tokens - lengths[i]))
        else:
            laid[fits].append(i)
            room[fits] -= lengths[i]
    return laid


def pack(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Tensor]:
    """Make a batch of packed rows.

    Args:
        features: ``input_ids`` of each example, and ``learnt`` where not all of its tokens are.
        tokenizer: names the token that fills the end of a row, as an example of its own of which nothing is learnt.
        tokens: tokens a row, at most; see :func:`rows`.

    Returns:
        int64 tensors of shape (rows, longest): ``input_ids``, ``position_ids`` (0, 1, … in each example) and ``learnt`` (1 where a token
        is predicted: the first one of an example never is). There is no ``attention_mask``: where none is given, attention stays within
        the runs of positions.
    """
    laid = rows([len(f["input_ids"]) for f in features], tokens)
    longest = max(sum(len(features[i]["input_ids"]) for i in row) for row in laid)
    filler = pad_id(tokenizer)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "learnt": []}
    for row in laid:
        ids = [token for i in row for token in features[i]["input_ids"]]
        learnt = [mark for i in row for mark in _predicted(features[i])]
        positions = [place for i in row for place in range(len(features[i]["input_ids"]))]
        rest = longest - len(ids)
        columns["input_ids"].append(ids + [filler] * rest)
        columns["position_ids"].append(positions + list(range(rest)))
        columns["learnt"].append(learnt + [0] * rest)
    return {name: torch.tensor(column, dtype=torch.int64) for name, column in columns.items()}


def _predicted(feature: Feature) -> list[int]:
    marks = feature.get("learnt", [1] * len(feature["input_ids"]))
    return [0, *marks[1:]]
