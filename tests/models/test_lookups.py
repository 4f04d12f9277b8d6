"""What a tokeniser gives, a model has a row for: told from its modules, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.data import Examples, pad, tokenise
from fedsb.models.loading import load_tokenizer
from fedsb.models.lookups import Tables, tables_of
from tests.architectures import BERT, DECODER, ENCODER, GPT2, LLAMA, SIZES
from tests.conftest import decoder_tokenizer, encoder_tokenizer, save

OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# A configuration, positions that a text can have, token types, the id that the model takes for padding.
CASES = {
    "bert": (hf.BertConfig(**BERT), 64, 2, 0),
    "roberta numbers from behind the padding id": (hf.RobertaConfig(**{**BERT, "pad_token_id": 1}, type_vocab_size=1), 62, 1, 1),
    "mpnet has a padding id of its own": (hf.MPNetConfig(**BERT), 62, 0, 1),
    "opt has an offset": (hf.OPTConfig(**OPT, vocab_size=DECODER, max_position_embeddings=40, pad_token_id=1), 40, 0, 1),
    "gpt2 reads token types from its vocabulary": (hf.GPT2Config(**GPT2), 64, DECODER, None),
    "llama has no table of positions": (hf.LlamaConfig(**LLAMA), 64, 0, None),
    "a padding id without a row": (hf.LlamaConfig(**LLAMA, pad_token_id=-1), 64, 0, None),
    "t5": (hf.T5Config(vocab_size=ENCODER, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2), 10**30, 0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_tables_are_told_from_the_modules(case: str) -> None:
    config, positions, types, padding = CASES[case]
    assert tables_of(config) == Tables(tokens=config.vocab_size, positions=positions, types=types, padding=padding)


def fitted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    """Save and load a tokeniser beside a model."""
    tokenizer.model_max_length = 10**30
    return load_tokenizer(load(["model=pretrained", f"model.name='{save(model, tokenizer, folder)}'"]).model)  # type: ignore[return-value]


def llama() -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))


def longest(vocabulary: int) -> Examples:
    return Examples(("goal " * (3 * vocabulary), "a"), pairs=("match", "film"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.RobertaModel(hf.RobertaConfig(**{**BERT, "pad_token_id": 1}, type_vocab_size=1)),
        lambda: hf.MPNetModel(hf.MPNetConfig(**BERT)),
        lambda: hf.BertModel(hf.BertConfig(**BERT, type_vocab_size=1)),
        lambda: hf.DistilBertModel(hf.DistilBertConfig(vocab_size=ENCODER, dim=32, hidden_dim=48, n_layers=1, n_heads=2)),
    ],
)
def test_the_longest_pair_has_a_row_for_everything(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    """The second texts are of another type, and the tokeniser knows no limit."""
    model = make().eval()
    tokenizer = fitted(model, encoder_tokenizer(), tmp_path)
    with torch.no_grad():
        model(**pad(tokenise(longest(512), tokenizer, 10**6), tokenizer))


def test_a_padding_token_beyond_the_embedding_does_no_harm(tmp_path: Path) -> None:
    tokenizer = decoder_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    found = fitted(llama(), tokenizer, tmp_path)
    assert int(pad(tokenise(Examples(("goal match", "a [PAD]")), found, 16), found)["input_ids"].max()) < DECODER


def test_words_beyond_the_embedding_are_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = decoder_tokenizer()
    tokenizer.add_tokens(["penalty", "referee"])
    with pytest.raises(
        UserError, match=rf"^[^\n]*ids up to {DECODER + 1} [^\n]* {DECODER} rows[^\n]*resize_token_embeddings\({DECODER + 2}\)"
    ):
        fitted(llama(), tokenizer, tmp_path)


def test_a_framing_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    """[SEP] ends every text, special as it is."""
    small = hf.BertModel(hf.BertConfig(**{**SIZES, "vocab_size": 3}))
    with pytest.raises(UserError, match=r"'\[SEP\]' is 3"):
        fitted(small, encoder_tokenizer(), tmp_path)


def test_tokens_that_a_template_or_we_write_have_rows_or_are_refused(tmp_path: Path) -> None:
    """A row with a turn of that kind has the token, and another has not; the end is learnt after each text."""
    tool, end = decoder_tokenizer(), decoder_tokenizer()
    tool.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    end.add_special_tokens({"eos_token": "<|done|>"})
    assert fitted(llama(), tool, tmp_path / "idle").model_max_length
    tool.chat_template = "{% for m in messages %}{% if m['role'] == 'system' %}<|tool|>{% endif %}{{ m['content'] }}{% endfor %}"
    for tokenizer, token in ((tool, r"<\|tool\|>"), (end, r"<\|done\|>")):
        with pytest.raises(UserError, match=rf"'{token}' is {DECODER}\)[^\n]* {DECODER} rows"):
            fitted(llama(), tokenizer, tmp_path / "told")


def test_rows_are_filled_with_what_the_model_takes_for_padding(tmp_path: Path) -> None:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, pad_token_id=0))
    found = fitted(model, decoder_tokenizer(), tmp_path)
    batch = pad(tokenise(Examples(("goal match", "a")), found, 16), found)
    assert batch["input_ids"][1, -1] == 0
