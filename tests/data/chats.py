"""Tokenizers, chat templates and rows for the tests of instruction data, and a slow reading of what is learnt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsb.config.compose import load
from fedsb.config.schema import DataConfig

START, STOP, END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Ends a conversation that is over by a token of its own, which no beginning of a longer one has: Phi-3 does so.
CLOSING = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# No special token at all, and nothing that asks for an answer.
BARE = "{% for message in messages %}{{ message['role'][0] + '> ' + message['content'] + '\\n' }}{% endfor %}"
TEMPLATES = {"none": None, "chatml": CHATML, "closing": CLOSING, "bare": BARE}
CORPUS = ["User: hello there\nAssistant: hello you", "one two three. four:five", "user\nassistant\nsystem\n"]


def byte_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE, as GPT-2 and SmolLM2 have it, that has merged the words of :data:`CORPUS`."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, START, STOP]
    bpe.train_from_iterator(
        CORPUS * 20, trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, additional_special_tokens=special[1:], chat_template=template)


def joining_tokenizer(*pairs: tuple[str, str]) -> PreTrainedTokenizerFast:
    """Return one token a letter, and one for each of the pairs, wherever the two letters stand side by side."""
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    joined = [a + b for a, b in pairs]
    words = {word: i for i, word in enumerate(["<unk>", END, *letters, *joined])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=list(pairs), unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token="<unk>")


def data(*more: str) -> DataConfig:
    """Return a configuration of instruction data."""
    return load(["data=files", "data.path=rows.jsonl", "data.task=causal_lm", *more]).data


def said(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learnt: Sequence[int]) -> list[str]:
    """Return each run of learnt tokens as a text."""
    runs: list[list[int]] = [[]]
    for i, kept in zip(ids, learnt, strict=True):
        if kept:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def messages(*said: tuple[str, str]) -> list[dict[str, Any]]:
    """Return chat messages."""
    return [{"role": role, "content": content} for role, content in said]


def talk(contents: Iterable[str], system: str | None = None) -> list[dict[str, Any]]:
    """Return a chat in which a user and an assistant say things in turn."""
    turns = [(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return messages(*([("system", system)] if system is not None else []), *turns)
