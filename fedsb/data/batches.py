"""From examples to batches: token ids without padding, an epoch's order by length, and padding as late as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress, islice
from operator import not_
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsb.data.examples import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Feature = Mapping[str, list[int]]


def order(lengths: Sequence[int], batch_size: int, *, bucket: int, generator: np.random.Generator) -> list[list[int]]:
    """Draw the batches of one epoch; every index stands in exactly one of them.

    Indices are shuffled, cut into buckets of ``bucket * batch_size``, sorted by length inside a bucket and cut into batches, which
    are shuffled in turn: batches hold examples of like length, and yet come in random order with a random make-up.

    Args:
        lengths: tokens of each example.
        batch_size: examples a batch; one batch may be smaller.
        bucket: batches a bucket holds; 1 gives plain shuffled batches.
        generator: where the draws come from.
    """
    shuffled = generator.permutation(len(lengths)).tolist()
    span = bucket * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), span):
        alike = sorted(shuffled[start : start + span], key=lengths.__getitem__)
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    return [batches[i] for i in generator.permutation(len(batches))]


def packed(lengths: Sequence[int], *, most: int, tokens: int) -> list[list[int]]:
    """Cut examples, the shortest first, into batches to be padded; every index stands in exactly one of them.

    Args:
        lengths: tokens of each example.
        most: examples a batch.
        tokens: tokens a batch, padding included; an example that is longer has a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not batches or len(batches[-1]) == most or (len(batches[-1]) + 1) * lengths[i] > tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


def tokenise(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, *, ends: bool = False) -> list[Feature]:
    """Turn examples into token ids, cut to ``max_length`` and not padded.

    Args:
        examples: texts, or pairs of texts.
        tokenizer: called once with the whole list, which is what makes fast tokenisers fast.
        max_length: tokens an example keeps, special ones included; the model's own limit holds too.
        ends: whether the end of a text is to be learnt: each ends with the end-of-text token, and one that is cut has no end.

    Returns:
        For every example ``input_ids``, and ``token_type_ids`` where the tokeniser gives them. No list is empty: a text without a
        token becomes one filler token, since a model cannot read nothing.
    """
    if not len(examples):
        return []
    limit = limit_of(tokenizer, max_length)
    filler = {"input_ids": [pad_id(tokenizer)], "token_type_ids": [0]}
    if ends:
        # A tokeniser that cuts puts its last token behind the cut: an end where there is none.
        return [{"input_ids": ids[:limit] or filler["input_ids"]} for ids in whole_ids(examples, tokenizer, ends=True)]
    encoded = _encoded(examples, tokenizer, truncation=True, max_length=limit)
    columns = {name: encoded[name] for name in filler if name in encoded}
    return [{name: list(column[i]) or filler[name] for name, column in columns.items()} for i in range(len(examples))]


def whole_ids(examples: Examples, tokenizer: PreTrainedTokenizerBase, *, ends: bool) -> list[list[int]]:
    """Return the token ids of whole examples, however long; with ``ends`` the last one is the end-of-text token, where there is one."""
    end = tokenizer.eos_token_id if ends else None
    # Not verbose: a text longer than the model's limit is no fault here.
    rows = _encoded(examples, tokenizer, truncation=False, verbose=False)["input_ids"]
    return [[*ids, end] if end is not None and list(ids[-1:]) != [end] else list(ids) for ids in rows]


def limit_of(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """Return how many tokens of an example are read: ``max_length``, or the model's own limit where that is lower."""
    return min(max_length, int(getattr(tokenizer, "model_max_length", max_length)))


def _encoded(examples: Examples, tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, list[list[int]]]:
    """Encode texts; what spells a special token in them is text like any other, and no token of the frame."""
    pairs = list(examples.pairs) if examples.pairs is not None else None
    encoded = tokenizer(
        list(examples.texts), pairs, return_attention_mask=False, return_special_tokens_mask=True, split_special_tokens=True, **options
    )
    columns = {name: list(encoded[name]) for name in ("input_ids", "token_type_ids") if name in encoded}
    # Some vocabularies hold their special tokens as words too.
    special, unknown = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, tokenizer.unk_token_id
    for row, frame in enumerate(encoded["special_tokens_mask"]):
        ids = columns["input_ids"][row]
        spelt = [not framed and i in special for i, framed in zip(ids, frame, strict=True)]
        if any(spelt) and unknown is not None:
            columns["input_ids"][row] = [unknown if is_spelt else i for i, is_spelt in zip(ids, spelt, strict=True)]
        elif any(spelt):
            for column in columns.values():
                column[row] = list(compress(column[row], map(not_, spelt)))
    return columns


def made_row(tokenizer: PreTrainedTokenizerBase, length: int, words: int = 3) -> list[int]:
    """Return a made-up text of so many tokens, framed as the tokeniser frames a text (some models look for its end).

    Args:
        tokenizer: of the model.
        length: tokens; a row shorter than the frame is cut.
        words: how many different ones there are in it, if the vocabulary has as many.
    """
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids = list(encoded["input_ids"])
    words_at = [place for place, mark in enumerate(encoded["special_tokens_mask"]) if not mark]
    # Some tokenisers mark an unknown word as special.
    inside = words_at or [place for place, i in enumerate(ids) if i == tokenizer.unk_token_id]
    before, after = (ids[: inside[0]], ids[inside[-1] + 1 :]) if inside else ([], ids)
    reserved = {*tokenizer.all_special_ids, pad_id(tokenizer)}
    own = list(islice((i for i in range(len(tokenizer)) if i not in reserved), words)) or [0]
    return [*before, *(own[i % len(own)] for i in range(length - len(before) - len(after))), *after][:length]


def pad(features: Sequence[Feature], tokenizer: PreTrainedTokenizerBase, length: int | None = None) -> dict[str, Tensor]:
    """Pad features on the right to the longest of them, or to a length that does not depend on them.

    Args:
        features: what :func:`tokenise` gave, at least one.
        tokenizer: names the padding token; see :func:`pad_id`.
        length: tokens of every row, whatever the features are; one that is longer is cut.

    Returns:
        int64 tensors of shape (batch, longest): the features' own keys and ``attention_mask``, 1 where there is a token.
    """
    longest = length or max(len(feature["input_ids"]) for feature in features)
    padding = {"input_ids": pad_id(tokenizer), "token_type_ids": tokenizer.pad_token_type_id, "learnt": 0}
    batch = {name: _stack([feature[name] for feature in features], longest, padding[name]) for name in features[0]}
    batch["attention_mask"] = _stack([[1] * len(feature["input_ids"]) for feature in features], longest, 0)
    return batch


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills a row: the one that the model takes for padding (:func:`fedsb.models.lookups.fit_tokenizer`).

    Of a tokeniser without a model, the padding token's, else that of the end of text (GPT-2, Llama), else 0; it is masked anyway.
    """
    chosen = (getattr(tokenizer, "fill_id", None), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return int(next((i for i in chosen if i is not None), 0))


def _stack(rows: Sequence[list[int]], longest: int, value: int) -> Tensor:
    return torch.tensor([row[:longest] + [value] * (longest - len(row)) for row in rows], dtype=torch.int64)
