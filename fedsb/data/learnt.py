"""Tokens of instruction data, and which of them are learnt.

A text is tokenised once and whole. A token is learnt when all of its characters are: one that joins the last letter of a prompt to the
first of its response is not. Of a prompt nothing is but spaces right before a response, which most tokenizers join to its first word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data.batches import Feature, limit_of, pad_id
from fedsb.data.examples import PARTS, Examples
from fedsb.data.framing import Span, Written, special_texts, writer_of
from fedsb.data.splits import Corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE = 8  # tokens that a tokenizer may put around a text


@dataclass(frozen=True)
class Marked:
    """The tokens of an example.

    Attributes:
        ids: all of them, however many.
        learnt: for each 1 where it is learnt, else 0.
    """

    ids: list[int]
    learnt: list[int]

    def left(self, limit: int | None = None) -> int:
        """Return how many tokens are predicted and learnt, of the first ``limit``: nothing comes before the first one."""
        return sum(self.learnt[1:limit])


class Token(NamedTuple):
    """A token and the characters that it stands for."""

    id: int
    start: int
    end: int
    framing: bool  # put there by the tokenizer, and no part of the text


def marked(examples: Examples, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> list[Marked]:
    """Tokenise rows of instruction data, and mark what ``data.loss_on`` says.

    Raises:
        UserError: the tokenizer cannot say where its tokens stand, or its chat template does not fit the rows.
    """
    if not len(examples):
        return []
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} does not say where in a text its tokens stand, which tells prompts from responses; "
            "name a fast one by model.tokenizer (a folder with a tokenizer.json), or use data.text"
        )
    write = writer_of(cfg, tokenizer)
    texts = [write(row) for row in examples.texts]
    found = [_marked(text, tokens, tokenizer) for text, tokens in zip(texts, tokens_of(texts, tokenizer), strict=True)]
    if cfg.loss_on == "response":
        return found
    return [Marked(row.ids, [int(bool(text.text))] * len(row.ids)) for row, text in zip(found, texts, strict=True)]


def tokenise_marked(examples: Examples, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, max_length: int) -> list[Feature]:
    """Turn rows of instruction data into ``input_ids`` and ``learnt``, cut to ``max_length`` and not padded.

    A row without a token becomes one filler token that is not learnt.
    """
    limit, filler = limit_of(tokenizer, max_length), pad_id(tokenizer)
    return [{"input_ids": row.ids[:limit] or [filler], "learnt": row.learnt[:limit] or [0]} for row in marked(examples, tokenizer, cfg)]


def answered(examples: Examples, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, max_length: int, *, part: str) -> Examples:
    """Return the rows of which ``max_length`` tokens leave something to learn.

    Raises:
        UserError: none is left.
    """
    limit, write = limit_of(tokenizer, max_length), writer_of(cfg, tokenizer)
    doubtful = [i for i, row in enumerate(examples.texts) if not _begins_early(write(row), limit)]
    rows = marked(examples.take(doubtful), tokenizer, cfg)
    lost = {i for i, row in zip(doubtful, rows, strict=True) if not row.left(limit)}
    kept = [i for i in range(len(examples)) if i not in lost]
    if lost and not kept:
        least = min((1 + row.learnt[1:].index(1) for row in rows if row.left()), default=limit) + 1
        raise UserError(
            f"train.max_length={max_length}: {limit} tokens leave nothing of any response in {PARTS[part]}, where the shortest prompt "
            f"and the first token of its response are {least}; raise it, or name a model that reads longer texts"
        )
    return examples if len(kept) == len(examples) else examples.take(kept)


def _begins_early(text: Written, limit: int) -> bool:
    """Tell whether a response begins so early that no token has to be counted: a token has a byte at least.

    Where a tokenizer makes more of a text than that, a row may be kept of which nothing is learnt; it has no loss then.
    """
    return bool(text.learnt) and len(text.text[: text.learnt[0][0]].encode()) + SPARE < limit


def answered_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, max_length: int, *, every_row: bool) -> Corpus:
    """Return a corpus whose rows have something to learn, and how many were left out.

    Args:
        corpus: as it was loaded.
        tokenizer: of the model.
        cfg: of the data.
        max_length: tokens that are read of a row.
        every_row: whether each training row keeps its place, with something to learn or not (``privacy.unit=example``).
    """
    parts = {name: held for name in ("train", "test", "public", "validation") if (held := getattr(corpus, name)) is not None}
    found = {name: answered(held, tokenizer, cfg, max_length, part=name) for name, held in parts.items()}
    if every_row:
        found["train"] = corpus.train
    dropped = {name: len(parts[name]) - len(held) for name, held in found.items() if len(held) < len(parts[name])}
    public, validation = found.get("public"), found.get("validation")
    return replace(corpus, train=found["train"], test=found["test"], public=public, validation=validation, dropped=dropped)


def tokens_of(texts: Sequence[Written], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[Token]]:
    """Yield the tokens of each text, tokenised once and whole, with those that the tokenizer puts around it."""
    whole = texts[0].whole if texts else False  # one writer's are all alike
    # Not verbose: a text longer than the model's limit is no fault here.
    encoded = tokenizer(
        [text.text for text in texts],
        add_special_tokens=not whole,
        split_special_tokens=False,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    for ids, offsets, frame in zip(encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
        yield [Token(i, a, b, bool(f)) for i, (a, b), f in zip(ids, offsets, frame, strict=True)]


def _marked(text: Written, tokens: list[Token], tokenizer: PreTrainedTokenizerBase) -> Marked:
    tokens = list(unspelt(text, tokens, tokenizer))
    ids = [token.id for token in tokens]
    learnt = [int(not token.framing and _inside(token, text.learnt)) for token in tokens]
    end = tokenizer.eos_token_id
    if text.ends and end is not None:
        if ids[-1:] != [end]:
            return Marked([*ids, end], [*learnt, 1])
        learnt[-1] = 1
    return Marked(ids, learnt)


def _inside(token: Token, spans: Sequence[Span]) -> bool:
    return any(start <= token.start and token.end <= end for start, end in spans)


def unspelt(text: Written, tokens: list[Token], tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    """Yield the tokens; what spells a special one in a row's own words is text like any other."""
    special = set(special_texts(tokenizer).values()) - {tokenizer.unk_token_id}
    for token in tokens:
        if token.framing or token.id not in special or not _inside(token, text.contents):
            yield token
            continue
        spelling = tokenizer(text.text[token.start : token.end], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for i in spelling:
            # Some vocabularies hold their special tokens as words too.
            if i not in special:
                yield token._replace(id=i)
            elif tokenizer.unk_token_id is not None:
                yield token._replace(id=tokenizer.unk_token_id)
