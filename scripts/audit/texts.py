"""The rows with texts of two lengths, in a model that reads across padding: a long text must not move the others' gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from others import StartRow
from rows import TrainRow, entry_of
from subject import FIRST_TOKEN, NETWORK, TOKENS, Subject, prepared

from fedsb.core.rng import torch_generator

SHORT, LONG, TEXTS, LABELS = 5, 40, 32, 3
# Which text is the long one.
AT = 2
# ConvBERT's convolutions run over the tokens, padding included.
NETWORK_OF_TEXTS = {
    **NETWORK,
    "model_type": "convbert",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "embedding_size": 32,
    "conv_kernel_size": 9,
    "head_ratio": 2,
    "num_groups": 1,
    "max_position_embeddings": LONG,
}


def texts(seed: int) -> Subject:
    """Draw many short texts that are nearly one, and a long one; the first two have opposite gradients, or nearly.

    The more alike the short ones' gradients are, the more what moves all of them alike adds up.
    """
    words = torch.randint(FIRST_TOKEN + TEXTS, TOKENS, (LONG,), generator=torch_generator(seed, "texts")).tolist()

    def text(i: int) -> dict[str, Any]:
        length = LONG if i == AT else SHORT
        return {"input_ids": [FIRST_TOKEN + i, *words[: length - 1]], "target": 1 if i in (1, AT) else 0}

    return prepared(NETWORK_OF_TEXTS, [text(i) for i in range(TEXTS)], labels=LABELS, max_length=LONG, excess=2.0, seed=seed)


def text_rows(seed: int) -> list[TrainRow | StartRow]:
    """Give the rows with two lengths; one is zeroed out in turn: the long text, and the second of the first two."""
    subject, whole = texts(seed), entry_of(1.0, 1)
    watched: Sequence[int] = (1, AT)
    row = partial(TrainRow, subject=subject, entry=whole, canaries=TEXTS, attacked=False, neighbours=watched)
    return [
        row("two lengths, flat", "a long text among short ones"),
        row("two lengths, two at a time", "four texts in physical batches of two", canaries=4, how={"max_batch": 2}),
        row("two lengths, per layer", "the same, clipped by layer", kind="per_layer"),
        row("two lengths, adaptive", "the same, with a bound that follows", kind="adaptive"),
        row("two lengths, functorch", "the same", how={"functorch": True}),
        row("two lengths, stack", "the long text is another client's", clients=2),
        StartRow("two lengths, private start", "the same", subject, whole, "core", attacked=False, neighbours=watched),
    ]
