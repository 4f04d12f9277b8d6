"""What the laws of instruction data share: tokenizers of every kind of template, drawn words, and what is learnt of a row."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fedsb.config.schema import DataConfig
from fedsb.data import Examples, marked
from fedsb.data.instructions import row_text
from tests.data.chats import TEMPLATES, byte_tokenizer, data, said

PAIR, CHAT = data("data.prompt=prompt", "data.response=response"), data("data.messages=chat")
WORDS = st.text(alphabet="ab hello.:\n", min_size=1).filter(lambda text: text.strip() == text)
TOKENIZERS = {name: byte_tokenizer(template) for name, template in TEMPLATES.items()}
law = settings(max_examples=25)


def rows(cfg: DataConfig, *values: dict[str, Any]) -> Examples:
    return Examples(tuple(row_text(cfg, row) for row in values))


def learnt_of(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[str]:
    (found,) = marked(rows(cfg, row), tokenizer, cfg)
    return said(tokenizer, found.ids, found.learnt)
