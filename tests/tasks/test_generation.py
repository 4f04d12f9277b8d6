"""Responses: batches of any make-up against one prompt at a time, and against a loop without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsb.config.compose import load
from fedsb.core.counting import counted_by
from fedsb.core.rng import numpy_generator, torch_stream
from fedsb.models.build import build_model
from fedsb.tasks.generation import LOOKS, RESPONSES, Decoding, generate, text_of
from fedsb.tasks.task import TASKS
from tests.architectures import checkpoint
from tests.conftest import decoder_tokenizer
from tests.data.chats import byte_tokenizer

TOKENIZER = decoder_tokenizer()
WORDS = len(TOKENIZER)
END = TOKENIZER.eos_token_id
GREEDY = Decoding(12)


def spirited(folder: Path, seed: int = 0) -> Any:
    """Build a model with adapters whose weights are so large that it says something else at every step."""
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", "data.task=causal_lm"])
    adapted = build_model(config.model, config.adapter, family="lora", task=TASKS["causal_lm"], labels=(), seed=seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, parameter in adapted.model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "embed" in name or "wte" in name else 0.4))
    return adapted


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = numpy_generator(seed, "test")
    return [draw.integers(3, WORDS, size=draw.integers(1, 20)).tolist() for _ in range(count)]


def asked(adapted: Any, rows: list[list[int]], decoding: Decoding = GREEDY, *, most: int = 64, tokens: int = 10**6) -> list[list[int]]:
    return generate(adapted.model, TOKENIZER, rows, decoding, ends=[END], most=most, tokens=tokens)


def slow(adapted: Any, prompt: list[int], steps: int = 12) -> list[int]:
    """Decode greedily by whole passes, without a cache, padding or a batch."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            logits: Tensor = adapted.model(input_ids=torch.tensor([ids])).logits
        token = int(logits[0, -1].argmax())
        if token == END:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "qwen3", "mamba", "llama that pads with another id"])
def test_a_batch_says_what_each_prompt_gets_alone(name: str, tmp_path: Path) -> None:
    adapted, rows = spirited(checkpoint(name, tmp_path)), prompts(9, 1)
    one_by_one = [asked(adapted, [row])[0] for row in rows]
    assert one_by_one == [slow(adapted, row) for row in rows]
    assert asked(adapted, rows) == one_by_one
    assert asked(adapted, rows, most=4) == one_by_one
    assert asked(adapted, rows, tokens=60) == one_by_one
    assert len({token for row in one_by_one for token in row}) > 5
    assert len({len(row) for row in one_by_one}) > 1 or all(len(row) == 12 for row in one_by_one)


def test_a_response_ends_where_it_should(tiny_llama: Path) -> None:
    """With the end token, whichever of several, or with a stop string: a batch goes on for the others."""
    adapted, rows = spirited(tiny_llama), prompts(12, 2)
    free = [generate(adapted.model, TOKENIZER, [row], GREEDY, ends=[], most=1, tokens=99)[0] for row in rows]
    assert {len(row) for row in free} == {12}
    end = free[0][3]
    ended = generate(adapted.model, TOKENIZER, rows, GREEDY, ends=[1, end], most=64, tokens=10**6)
    firsts = [min([row.index(token) for token in (1, end) if token in row], default=12) for row in free]
    assert [len(row) for row in ended] == firsts
    assert all(row == whole[: len(row)] for row, whole in zip(ended, free, strict=True))
    word = TOKENIZER.decode([free[1][4]])
    stopped = generate(adapted.model, TOKENIZER, rows, Decoding(12, stop=(word,)), ends=[], most=64, tokens=10**6)
    texts = [text_of(TOKENIZER, row, (word,)) for row in stopped]
    assert texts == [text_of(TOKENIZER, row, (word,)) for row in free]
    assert all(word not in text for text in texts)
    alone = generate(adapted.model, TOKENIZER, rows[1:2], Decoding(12, stop=(word,)), ends=[], most=1, tokens=99)[0]
    assert alone == free[1][: free[1].index(free[1][4]) + 1]


def test_a_special_token_ends_a_response_where_it_is_a_stop_text(tiny_llama: Path) -> None:
    """Responses are read without special tokens; they are looked for before that, alone and with what stands around them."""
    adapted, rows = spirited(tiny_llama), prompts(12, 2)
    free = [generate(adapted.model, TOKENIZER, [row], GREEDY, ends=[], most=1, tokens=99)[0] for row in rows]
    unknown, start = TOKENIZER.unk_token_id, TOKENIZER.bos_token_id
    special = next(each for each in (END, start, unknown) if any(each in row[1:] for row in free))
    stop = (TOKENIZER.convert_ids_to_tokens(special),)
    stopped = generate(adapted.model, TOKENIZER, rows, Decoding(12, stop=stop), ends=[], most=64, tokens=10**6)
    for row, whole in zip(stopped, free, strict=True):
        before = whole[: whole.index(special)] if special in whole else whole
        assert text_of(TOKENIZER, row, stop) == text_of(TOKENIZER, whole, stop) == text_of(TOKENIZER, before)
    alone = next(i for i, row in enumerate(free) if special in row)
    found = generate(adapted.model, TOKENIZER, [rows[alone]], Decoding(12, stop=stop), ends=[], most=1, tokens=99)[0]
    assert len(found) == free[alone].index(special) + 1


def test_any_other_stop_text_ends_generation_where_it_is_read(tiny_llama: Path) -> None:
    """Not where a special token is spelt like it, and past one that readers do not see."""
    adapted, rows = spirited(tiny_llama), prompts(12, 2)

    def said(row: list[int], *stop: str) -> list[int]:
        return generate(adapted.model, TOKENIZER, [row], Decoding(12, stop=stop), ends=[], most=1, tokens=99)[0]

    free = [said(row) for row in rows]
    special = set(TOKENIZER.all_special_ids)
    number, place = next((i, place) for i, row in enumerate(free) for place in range(1, 11) if row[place] in special)
    whole = free[number]
    spelt = TOKENIZER.convert_ids_to_tokens(whole[place])[1:-1]
    assert spelt not in text_of(TOKENIZER, whole)
    assert said(rows[number], spelt) == whole
    around = text_of(TOKENIZER, whole[place - 1 : place + 2])
    assert around not in TOKENIZER.decode(whole)
    assert said(rows[number], around) == whole[: place + 2]


@pytest.mark.parametrize(
    ("said", "stop", "left"),
    [
        ("hello you<|im_end|>there", ("<|im_end|>",), "hello you"),
        ("hello you<|im_end|>there", ("im_end",), "hello youthere"),
        ("hello<|im_start|>: you", ("|",), "hello: you"),
        ("hello<|im_start|>\n<|im_start|>\nthere", ("\n\n",), "hello"),
        ("one<|im_start|> two<|im_end|>", ("<|im_end|>", "one two"), ""),
        ("hello<|im_start|> you<|im_end|>\nthere", ("<|im_end|>\n",), "hello you"),
        ("hello<|im_start|> you\n\nthere", ("\n\n", "there"), "hello you"),
        ("hello<|im_start|> you there", ("u the",), "hello yo"),
        ("<|im_end|>hello", ("<|im_end|>",), ""),
        ("hello é<|im_end|>", ("<|im_end|>",), "hello é"),
        ("hello 😀 you", ("😀",), "hello "),
        ("hello<|im_end|> you", ("three",), "hello you"),
    ],
)
def test_a_response_is_cut_where_the_first_stop_text_begins(said: str, stop: tuple[str, ...], left: str) -> None:
    tokenizer = byte_tokenizer()
    assert text_of(tokenizer, tokenizer(said).input_ids, stop) == left


def test_what_is_drawn_follows_from_its_stream(tiny_llama: Path) -> None:
    adapted, rows = spirited(tiny_llama), prompts(5, 3)

    def drawn(number: int, decoding: Decoding) -> list[list[int]]:
        with torch_stream(0, "eval.generate", number):
            return asked(adapted, rows, decoding)

    hot = Decoding(12, temperature=2.0)
    assert drawn(1, hot) == drawn(1, hot) != drawn(2, hot)
    assert drawn(1, Decoding(12, temperature=1e-4)) == asked(adapted, rows)
    assert drawn(1, Decoding(12, temperature=2.0, top_p=1e-6)) == asked(adapted, rows)


def test_a_models_own_settings_do_not_count(tiny_llama: Path) -> None:
    """Neither penalties nor a temperature of its generation_config.json, which stays as it was."""
    adapted, rows = spirited(tiny_llama), prompts(4, 4)
    plain = asked(adapted, rows)
    own = adapted.model.generation_config
    own.update(repetition_penalty=5.0, do_sample=True, temperature=3.0, max_length=3, num_beams=1)
    assert asked(adapted, rows) == plain
    assert adapted.model.generation_config is own


def test_a_base_in_bfloat16_answers_too(tiny_llama: Path) -> None:
    config = load(["model=pretrained", f"model.name='{tiny_llama}'", "model.dtype=bfloat16", "rank=2", "data.task=causal_lm"])
    adapted = build_model(config.model, config.adapter, family="lora", task=TASKS["causal_lm"], labels=(), seed=0)
    assert {len(row) for row in generate(adapted.model, TOKENIZER, prompts(3, 5), GREEDY, ends=[], most=3, tokens=99)} == {12}


def test_how_far_it_is_is_told_in_the_middle_of_a_batch_too(tmp_path: Path) -> None:
    adapted, told = spirited(checkpoint("llama", tmp_path)), []
    with counted_by(lambda *each: told.append(each)):
        rows = asked(adapted, prompts(7, 1), Decoding(3 * LOOKS), most=3)
    done = [count for _, count, _ in told]
    assert {(what, total) for what, _, total in told} == {(RESPONSES, 7)}
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 7)
    assert {3, 6} <= set(done)
    assert len(told) > 1 + 3  # beyond the start and a batch's end
    assert len(rows) == 7
