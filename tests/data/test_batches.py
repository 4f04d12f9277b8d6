"""Batches: an epoch's order, tokens without padding, and padding that adds nothing but masked places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedsb.data import Examples, made_row, order, packed, pad, tokenise, whole_ids
from fedsb.tasks.task import TASKS
from tests.conftest import decoder_tokenizer, encoder_tokenizer

WORDS = {word: i for i, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c"])}


@pytest.fixture(scope="module")
def encoder():
    """Words between [CLS] and [SEP], with token types, as BERT has them."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names)


@pytest.fixture(scope="module")
def decoder():
    """Plain words without a padding token, as GPT-2 has them."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def ender(decoder):
    """A tokeniser that ends each text by itself, also one that it cuts."""
    words = Tokenizer.from_str(decoder.backend_tokenizer.to_str())
    words.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_holds_every_index_once_in_full_batches(lengths, batch_size, bucket, seed):
    batches = order(lengths, batch_size, bucket=bucket, generator=np.random.default_rng(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == order(lengths, batch_size, bucket=bucket, generator=np.random.default_rng(seed))


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7), st.integers(1, 120))
def test_an_evaluation_reads_every_index_once_within_both_budgets(lengths, most, tokens):
    batches = packed(lengths, most=most, tokens=tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch, after in zip(batches, [*batches[1:], []], strict=False):
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or (len(batch) <= most and len(batch) * longest <= tokens)
        # Neither is another batch begun before one of the budgets is spent.
        assert not after or len(batch) == most or (len(batch) + 1) * lengths[after[0]] > tokens
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_buckets_save_padding_and_epochs_differ():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 100, size=400).tolist()

    def padded(bucket):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in order(lengths, 10, bucket=bucket, generator=generator))

    assert padded(8) < 0.8 * padded(1)
    assert order(lengths, 10, bucket=8, generator=generator) != order(lengths, 10, bucket=8, generator=generator)


def test_tokens_are_cut_and_not_padded(encoder):
    features = tokenise(Examples(("a b c", "a", "")), encoder, 4)
    assert [feature["input_ids"] for feature in features] == [[1, 4, 5, 2], [1, 4, 2], [1, 2]]
    assert tokenise(Examples(()), encoder, 4) == []


def test_pairs_carry_token_types(encoder):
    (feature,) = tokenise(Examples(("a b",), pairs=("c",)), encoder, 8)
    assert feature == {"input_ids": [1, 4, 5, 2, 6, 2], "token_type_ids": [0, 0, 0, 0, 1, 1]}


def test_the_models_own_limit_holds(encoder):
    short = PreTrainedTokenizerFast(tokenizer_object=encoder.backend_tokenizer, pad_token="[PAD]", model_max_length=3)
    assert tokenise(Examples(("a b c",)), short, 64)[0]["input_ids"] == [1, 4, 2]


def test_padding_reaches_the_longest_and_is_masked(encoder):
    batch = pad(tokenise(Examples(("a b c", "a")), encoder, 64), encoder)
    assert batch["input_ids"].tolist() == [[1, 4, 5, 6, 2], [1, 4, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["token_type_ids"].shape == (2, 5)
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_a_tokeniser_without_padding_fills_with_the_end_of_text(decoder):
    features = tokenise(Examples(("a b", "c", "")), decoder, 64)
    batch = pad(features, decoder)
    assert batch["input_ids"].tolist() == [[4, 5], [6, 2], [2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0], [1, 0]]
    assert "token_type_ids" not in batch


@pytest.mark.parametrize("kind", ["decoder", "ender"])
@given(texts=st.lists(st.lists(st.sampled_from("abc"), max_size=6), min_size=1, max_size=5), limit=st.integers(2, 8))
def test_a_text_ends_where_it_is_whole(request, kind, texts, limit):
    """Whether its tokeniser ends texts or not, a language model sees the end-of-text token once, and none where a text is cut."""
    tokenizer = request.getfixturevalue(kind)
    features = tokenise(Examples(tuple(" ".join(words) for words in texts)), tokenizer, limit, ends=True)
    for words, feature in zip(texts, features, strict=True):
        assert feature["input_ids"] == [*(WORDS[word] for word in words), 2][:limit]
    whole = whole_ids(Examples(tuple(" ".join(words) for words in texts)), tokenizer, ends=True)
    assert [len(ids) for ids in whole] == [len(words) + 1 for words in texts]


def test_padding_with_the_end_of_text_does_not_hide_the_end(decoder):
    """The places behind a text hold the same id as its end, and the mask alone tells them apart."""
    batch = pad(tokenise(Examples(("a b c", "a")), decoder, 8, ends=True), decoder)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 2], [4, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert TASKS["causal_lm"].terms(batch) == 3 + 1
    logits = torch.zeros(2, 4, 7)
    logits[1, 0, 2] = 3.0  # only the short text's first token foretells its end
    certain, plain = (TASKS["causal_lm"].losses(x, batch)[1] for x in (logits, torch.zeros(2, 4, 7)))
    assert certain < plain


def test_an_empty_text_is_its_end(decoder):
    assert tokenise(Examples(("",)), decoder, 8, ends=True) == [{"input_ids": [2]}]
    assert tokenise(Examples(()), decoder, 8, ends=True) == []


def test_a_tokeniser_without_an_end_adds_none(encoder):
    assert tokenise(Examples(("a",)), encoder, 8, ends=True) == [{"input_ids": [1, 4, 2]}]


@pytest.mark.parametrize("text", ["old [SEP] film", "[PAD]", "a [CLS][SEP] goal [MASK]"])
def test_what_spells_a_special_token_is_text(text: str) -> None:
    encoder = encoder_tokenizer()
    encoder.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # the marks are words of the vocabulary then
    ids = tokenise(Examples((text,)), encoder, 32)[0]["input_ids"]
    assert (ids[0], ids[-1]) == (encoder.cls_token_id, encoder.sep_token_id)
    assert not {encoder.cls_token_id, encoder.sep_token_id, encoder.pad_token_id} & set(ids[1:-1])


@given(length=st.integers(2, 20))
def test_a_made_row_is_framed_as_a_text(length: int) -> None:
    for tokenizer in (encoder_tokenizer(), decoder_tokenizer()):
        row = made_row(tokenizer, length)
        assert len(row) == length
        special = [i for i in row if i in tokenizer.all_special_ids]
        assert special == [i for i in tokenizer("goal")["input_ids"] if i in tokenizer.all_special_ids]


@given(length=st.integers(1, 20), words=st.integers(1, 9))
def test_a_made_row_has_the_length_and_the_words_that_are_asked_for(length: int, words: int) -> None:
    for tokenizer in (encoder_tokenizer(), decoder_tokenizer()):
        row = made_row(tokenizer, length, words)
        assert len(row) == length
        own = [i for i in row if i not in tokenizer.all_special_ids]
        assert len(set(own)) == min(len(own), words)


def test_an_unknown_word_is_no_part_of_the_frame() -> None:
    """Tokenisers that are no fast ones mark it as special."""
    fast = encoder_tokenizer()

    class Marking:
        unk_token_id, pad_token_id, eos_token_id, all_special_ids = fast.unk_token_id, fast.pad_token_id, None, fast.all_special_ids

        def __len__(self) -> int:
            return len(fast)

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            ids = [fast.cls_token_id, fast.unk_token_id, fast.sep_token_id]
            return {"input_ids": ids, "special_tokens_mask": [1] * len(ids)}

    row = made_row(Marking(), 6)  # type: ignore[arg-type]
    assert (row[0], row[-1]) == (fast.cls_token_id, fast.sep_token_id)
    assert not set(row[1:-1]) & set(fast.all_special_ids)
