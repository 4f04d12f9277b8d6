"""Prompts of instruction data: what stands before a row's last response, tokenised as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedsb.config.schema import DataConfig
from fedsb.data.batches import pad_id
from fedsb.data.cells import shown
from fedsb.data.examples import Examples
from fedsb.data.framing import Written, special_texts, writer_of
from fedsb.data.instructions import RowError, answered_with, choices_of, right_of, turns_of
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
        answer: for each 1 where it counts for the answer, the one that ends it not among them, else 0.
        length: characters of the answer.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]
    length: int


def continuations(row: str, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> tuple[list[Continuation], int]:
    """Return a row's prompt with each of its choices, written as in training, and the index of the right one; no list where it has none.

    What counts of each begins at the same token: the first that holds any of an answer, or by which two of them differ. Where a tokenizer
    joins the end of the prompt to some answers and not to others, likelihoods of all are then given the same tokens.

    Raises:
        RowError: the response is none of the choices, two choices are the same tokens, or one is no token at all.
    """
    if not (choices := choices_of(cfg, row)):
        return [], 0
    right = right_of(turns_of(cfg, row)[-1].content, choices)
    write = writer_of(cfg, tokenizer)
    texts = [write(answered_with(cfg, row, choice)) for choice in choices]
    tokens = [list(unspelt(text, found, tokenizer)) for text, found in zip(texts, tokens_of(texts, tokenizer), strict=True)]
    if alike := _alike(tokens):
        raise RowError(
            "two choices that are the same tokens",
            f"the choices {' and '.join(shown(choices[i]) for i in alike)}, the same to the tokenizer",
        )
    begin = min(_parting(tokens), *(_answer_at(text, row) for text, row in zip(texts, tokens, strict=True)))
    # A model cannot go on from nothing.
    before = () if begin else (start_id(tokenizer),)
    found = [_continued(text, row, begin, before) for text, row in zip(texts, tokens, strict=True)]
    if silent := [choice for choice, each in zip(choices, found, strict=True) if not any(each.answer)]:
        raise RowError("a choice without a token of its own", f"the choice {shown(silent[0])}, of which the tokenizer makes nothing")
    return found, right


def start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of what an answer without a prompt is given to go on from."""
    begins = tokenizer.bos_token_id
    return int(begins) if begins is not None else pad_id(tokenizer)


def _alike(tokens: Sequence[Sequence[Token]]) -> tuple[int, int] | None:
    seen: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(tokens):
        if (first := seen.setdefault(tuple(token.id for token in row), i)) != i:
            return first, i
    return None


def _parting(tokens: Sequence[Sequence[Token]]) -> int:
    """Return how many tokens all rows begin with."""
    same = (len({token.id for token in column}) == 1 for column in zip(*tokens, strict=False))
    return next((i for i, each in enumerate(same) if not each), min(map(len, tokens)))


def _answer_at(text: Written, tokens: Sequence[Token]) -> int:
    """Return the number of the first token that holds some of the answer, or of the spaces right before it and nothing else.

    What else a chat template writes into a response (an empty ``<think>``) is the same before each choice, and no part of one.
    """
    first, last = text.contents[-1]
    frame = text.text[text.learnt[-1][0] : first]
    start = first - (len(frame) - len(frame.rstrip(" ")))
    held = (not t.framing and (start <= t.start <= t.end <= last or (t.end > first and t.start < last)) for t in tokens)
    return next((i for i, each in enumerate(held) if each), len(tokens))


def _continued(text: Written, tokens: Sequence[Token], begin: int, before: tuple[int, ...]) -> Continuation:
    first, last = text.contents[-1]
    answer = tuple(int(i >= begin and not token.framing and token.start < last) for i, token in enumerate(tokens))
    return Continuation((*before, *(token.id for token in tokens)), (*(0 for _ in before), *answer), last - first)


def _cut(texts: list[Written], tokenizer: PreTrainedTokenizerBase, special: list[str]) -> Iterator[Prompt]:
    rows = [_before(text, special) for text in texts]
    for (asked, reference, end), tokens in zip(rows, tokens_of([asked for asked, *_ in rows], tokenizer), strict=True):
        while tokens and tokens[-1].framing:  # what the tokenizer puts behind a whole text
            tokens.pop()
        ids = [token.id for token in unspelt(asked, tokens, tokenizer)]
        # A model cannot go on from nothing.
        yield Prompt(asked.text, tuple(ids or [start_id(tokenizer)]), reference, end)


def _before(text: Written, special: list[str]) -> tuple[Written, str, str]:
    """Return what stands before the last response that says something, what it says, and the special token that ends it."""
    said = [(span, inside) for span in text.learnt for inside in text.contents if span[0] <= inside[0] and inside[1] <= span[1]]
    (start, stop), (first, last) = next((row for row in reversed(said) if text.text[slice(*row[1])].strip()), said[-1])
    contents = tuple((a, min(b, start)) for a, b in text.contents if a < start)
    end = next((name for name in special if text.text[last:stop].endswith(name)), "")
    return replace(text, text=text.text[:start], learnt=(), contents=contents), text.text[first:last], end
