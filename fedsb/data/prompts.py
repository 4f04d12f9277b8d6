"""Prompts of instruction data: what stands before a row's last response, tokenised as in training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedsb.config.schema import DataConfig
from fedsb.data.batches import pad_id
from fedsb.data.examples import Examples
from fedsb.data.framing import Written, special_texts, writer_of
from fedsb.data.instructions import answered_with, choices_of
from fedsb.data.learnt import Token, tokens_of, unspelt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        text: of the prompt, its frame included.
        ids: its tokens; nothing of the response is in them.
        reference: the response of the data.
        end: the text that ends a response in training, where that is a special token; else empty.
    """

    text: str
    ids: tuple[int, ...]
    reference: str
    end: str


def prompts_of(examples: Examples, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> list[Prompt]:
    """Return the prompt of each row of instruction data, whole, however long.

    A row's last response that says something is the one to be given.

    Raises:
        UserError: the chat template does not fit the rows.
    """
    write, special = writer_of(cfg, tokenizer), sorted(special_texts(tokenizer), key=len, reverse=True)
    return list(_cut([write(row) for row in examples.texts], tokenizer, special))


def end_ids(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, own: int | list[int] | None = None) -> list[int]:
    """Return the ids that end a response: the end-of-text token, what ends responses in training, and the model's ``own``; sorted."""
    names, model = special_texts(tokenizer), own if isinstance(own, list) else [own]
    found = {tokenizer.eos_token_id, *(names[prompt.end] for prompt in prompts if prompt.end), *model}
    return sorted(i for i in found if i is not None)


@dataclass(frozen=True)
class Continuation:
    """A prompt with one of the answers that may follow it.

    Attributes:
        ids: tokens of both.
        answer: for each 1 where it is a token of the answer, without the one that ends it, else 0.
        length: characters of the answer.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    length: int


def continuations(row: str, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> tuple[list[Continuation], int]:
    """Return a row's prompt with each of its choices, written as in training, and the index of the right one; no list where it has none."""
    if not (choices := choices_of(cfg, row)):
        return [], 0
    write = writer_of(cfg, tokenizer)
    texts = [write(answered_with(cfg, row, choice)) for choice in choices]
    found = [
        _continued(text, list(unspelt(text, tokens, tokenizer))) for text, tokens in zip(texts, tokens_of(texts, tokenizer), strict=True)
    ]
    right = next((i for i, choice in enumerate(choices) if answered_with(cfg, row, choice) == row), 0)
    return found, right


def _continued(text: Written, tokens: list[Token]) -> Continuation:
    start, (first, last) = text.learnt[-1][0], text.contents[-1]
    inside = tuple(int(not token.framing and start <= token.start and token.end <= last) for token in tokens)
    return Continuation(tuple(token.id for token in tokens), inside, last - first)


def _cut(texts: list[Written], tokenizer: PreTrainedTokenizerBase, special: list[str]) -> Iterator[Prompt]:
    rows = [_before(text, special) for text in texts]
    for (asked, reference, end), tokens in zip(rows, tokens_of([asked for asked, *_ in rows], tokenizer), strict=True):
        while tokens and tokens[-1].framing:  # what the tokenizer puts behind a whole text
            tokens.pop()
        ids = [token.id for token in unspelt(asked, tokens, tokenizer)]
        # A model cannot go on from nothing.
        yield Prompt(asked.text, tuple(ids or [tokenizer.bos_token_id or pad_id(tokenizer)]), reference, end)


def _before(text: Written, special: list[str]) -> tuple[Written, str, str]:
    """Return what stands before the last response that says something, what it says, and the special token that ends it."""
    said = [(span, inside) for span in text.learnt for inside in text.contents if span[0] <= inside[0] and inside[1] <= span[1]]
    (start, stop), (first, last) = next((row for row in reversed(said) if text.text[slice(*row[1])].strip()), said[-1])
    contents = tuple((a, min(b, start)) for a, b in text.contents if a < start)
    end = next((name for name in special if text.text[last:stop].endswith(name)), "")
    return replace(text, text=text.text[:start], learnt=(), contents=contents), text.text[first:last], end
