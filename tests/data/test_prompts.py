"""Prompts of generation: the beginning of what is trained on, and nothing of the response."""

from __future__ import annotations

import pytest

from fedsb.data import Examples, end_ids, marked, prompts_of
from fedsb.data.instructions import row_text
from tests.data.chats import END, STOP, TEMPLATES, byte_tokenizer, data, joining_tokenizer, talk

SAID = (["hello <|im_end|> there", "hello you", "two?", "three"], ["a", " b. "], ["a", "b", "c", " "])
REFERENCES = ["three", " b. ", "b"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_stands_before_the_last_response_in_training(name):
    tokenizer, cfg = byte_tokenizer(TEMPLATES[name]), data("data.messages=talk")
    rows = Examples(tuple(row_text(cfg, {"talk": talk(contents, "be kind")}) for contents in SAID))
    found = prompts_of(rows, tokenizer, cfg)
    assert [prompt.reference.strip() for prompt in found] == [text.strip() for text in REFERENCES]
    for prompt, row in list(zip(found, marked(rows, tokenizer, cfg), strict=True))[:2]:
        assert list(prompt.ids) == row.ids[: len(prompt.ids)]
        last = max(i for i, learnt in enumerate(row.learnt) if not learnt and any(row.learnt[i:])) + 1
        assert len(prompt.ids) == last
    ends = {tokenizer.convert_tokens_to_ids(END), *([tokenizer.convert_tokens_to_ids(STOP)] if name in ("chatml", "closing") else [])}
    assert end_ids(found, tokenizer) == sorted(ends)
    assert end_ids(found, tokenizer, [7, 9]) == sorted({*ends, 7, 9})


def test_no_letter_of_the_response_is_in_the_prompt_where_a_token_would_join_the_two():
    tokenizer = joining_tokenizer((":", "y"), ("q", "a"))
    cfg = data("data.template='Q{question}:{answer}'")
    rows = Examples((row_text(cfg, {"question": "q", "answer": "yes"}),))
    (prompt,) = prompts_of(rows, tokenizer, cfg)
    assert tokenizer.convert_ids_to_tokens(list(prompt.ids)) == ["Q", "q", ":"]
    assert (prompt.text, prompt.reference) == ("Qq:", "yes")


def test_a_model_is_given_something_to_go_on_from():
    tokenizer, cfg = byte_tokenizer(), data("data.template='{answer}'")
    (prompt,) = prompts_of(Examples((row_text(cfg, {"answer": "yes"}),)), tokenizer, cfg)
    assert (prompt.text, len(prompt.ids)) == ("", 1)


def test_system_texts_and_templates_are_in_it():
    tokenizer, cfg = byte_tokenizer(TEMPLATES["chatml"]), data("data.prompt=q", "data.response=a", "data.system='be {how}'")
    (prompt,) = prompts_of(Examples((row_text(cfg, {"q": "why", "a": "so", "how": "kind"}),)), tokenizer, cfg)
    assert prompt.text == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
