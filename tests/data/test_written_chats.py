"""A chat is written as its template writes it, row by row, no text passes for a special token, and what cannot be read is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from fedsb.core.errors import UserError
from fedsb.data import Examples, marked
from fedsb.data.framing import special_texts
from tests.conftest import decoder_tokenizer
from tests.data.chats import CHATML, END, START, STOP, TEMPLATES, byte_tokenizer, data, talk
from tests.data.learnt import CHAT, PAIR, TOKENIZERS, WORDS, law, learnt_of, rows


@law
@given(prompt=WORDS, response=WORDS)
def test_prompt_and_response_are_a_chat_of_two_turns(prompt: str, response: str) -> None:
    for tokenizer in TOKENIZERS.values():
        (pair,) = marked(rows(PAIR, {"prompt": prompt, "response": response}), tokenizer, PAIR)
        (chat,) = marked(rows(CHAT, {"chat": talk([prompt, response])}), tokenizer, CHAT)
        assert pair == chat


@law
@given(prompt=WORDS, response=WORDS)
def test_the_plain_template_by_name_is_what_a_chat_is_written_as_without_one(prompt: str, response: str) -> None:
    named = data("data.template=plain")
    row = {"prompt": prompt, "response": response}
    assert marked(rows(named, row), TOKENIZERS["none"], named) == marked(rows(PAIR, row), TOKENIZERS["none"], PAIR)


@pytest.mark.parametrize("kind", ["none", "chatml", "bare"])
@law
@given(spelt=st.sampled_from([START, STOP, END]), before=st.sampled_from(["", "hello "]), behind=st.sampled_from(["", " you"]))
def test_what_spells_a_special_token_is_text_and_the_templates_own_are_none(kind: str, spelt: str, before: str, behind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    special = set(special_texts(tokenizer).values())

    def frame(text: str) -> list[int]:
        (found,) = marked(rows(CHAT, {"chat": talk([text, "one", "two", text])}), tokenizer, CHAT)
        return [i for i in found.ids if i in special]

    assert frame(before + spelt + behind) == frame("hello")
    assert learnt_of(CHAT, tokenizer, {"chat": talk(["one", before + spelt + behind])}) != []


def test_a_vocabulary_that_holds_special_tokens_as_words_leaves_none_in_a_text() -> None:
    tokenizer = decoder_tokenizer()
    (found,) = marked(rows(PAIR, {"prompt": "goal </s> bank", "response": "<s> team"}), tokenizer, PAIR)
    assert (found.ids.count(tokenizer.eos_token_id), found.ids.count(tokenizer.bos_token_id)) == (1, 0)
    assert found.learnt[-1] == 1


def test_a_system_text_is_put_before_those_that_have_none() -> None:
    cfg = data("data.messages=chat", "data.system='{who}: one two three'")
    (put,) = marked(rows(cfg, {"chat": talk(["a", "b"]), "who": "hello"}), TOKENIZERS["chatml"], cfg)
    (own,) = marked(rows(cfg, {"chat": talk(["a", "b"], "own"), "who": "hello"}), TOKENIZERS["chatml"], cfg)
    assert TOKENIZERS["chatml"].decode(put.ids).startswith(f"{START}system\nhello: one two three{STOP}")
    assert TOKENIZERS["chatml"].decode(own.ids).startswith(f"{START}system\nown{STOP}")


def test_alpaca_leaves_its_input_out_where_there_is_none() -> None:
    cfg = data("data.template=alpaca")
    texts = [
        TOKENIZERS["none"].decode(marked(rows(cfg, row), TOKENIZERS["none"], cfg)[0].ids)
        for row in ({"instruction": "add", "input": "1 2", "output": "3"}, {"instruction": "add", "input": "", "output": "3"})
    ]
    assert texts[0].endswith("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n3" + END)
    assert texts[1].endswith("request.\n\n### Instruction:\nadd\n\n### Response:\n3" + END)
    assert "### Input" not in texts[1]


REFUSED: dict[str, tuple[str, Sequence[dict[str, Any]], str]] = {
    "turned around": (
        "{% for message in messages | reverse %}{{ message['content'] }};{% endfor %}", talk(["a", "b"]),
        r"does not write each turn of user, assistant once and in its order; correct",
    ),
    "raises": (
        "{{ raise_exception('System role not supported') }}", talk(["a", "b"]), r"does not take turns .* \(System role not supported\)",
    ),
    "rewrites": (
        "{% for message in messages %}{{ '|' + message['content'].split('!')[-1] }}{% endfor %}", talk(["a", "b!c"]),
        "writes something else than what is said in the conversation that begins 'a'",
    ),
    "asks otherwise": (
        "{% for message in messages %}{{ '|' + message['content'] }}{% endfor %}{% if add_generation_prompt %}think{% endif %}",
        talk(["a", "b"]), "lets an answer begin otherwise than it writes one down",
    ),
    "ends otherwise": (
        "{% for message in messages %}{{ '|' + message['content'] }}{% endfor %}{% if not add_generation_prompt %}!{% endif %}",
        talk(["a", "b", "c", "d"]), "ends an answer otherwise inside of a conversation than at its end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_chat_template_that_cannot_be_read_is_refused_in_one_line(case: str) -> None:
    template, chat, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        marked(rows(CHAT, {"chat": chat}), byte_tokenizer(template), CHAT)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_places_is_refused() -> None:
    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(UserError, match=r"^the tokenizer of slow does not say where .* data\.text$"):
        marked(rows(PAIR, {"prompt": "a", "response": "b"}), Slow(), PAIR)  # type: ignore[arg-type]


def test_rows_are_read_alone_as_beside_others() -> None:
    chats = [talk(["a", "b"]), talk(["hello", "you", "one", "two"]), talk(["b", "c", "d"], "a")]
    whole = rows(CHAT, *({"chat": chat} for chat in chats))
    for tokenizer in TOKENIZERS.values():
        assert marked(whole, tokenizer, CHAT) == [marked(whole.take([i]), tokenizer, CHAT)[0] for i in range(len(chats))]


def begins(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a token before each text, as Llama's does, but where a template writes its own."""
    tokenizer = byte_tokenizer(template)
    frame = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.convert_tokens_to_ids(END))])
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


def test_a_row_that_says_nothing_is_the_same_whoever_lies_beside_it() -> None:
    """Whether a token stands before it is no matter of the others."""
    [chat] = rows(CHAT, {"chat": talk(["a", "b"])}).texts
    for tokenizer in (begins(CHATML), *TOKENIZERS.values()):
        alone = marked(Examples(("",)), tokenizer, CHAT)[0]
        assert marked(Examples(("", chat)), tokenizer, CHAT)[0] == marked(Examples(("", "")), tokenizer, CHAT)[1] == alone


class Counting(PreTrainedTokenizerFast):
    """Counts what its template is asked to write."""

    written = 0

    def apply_chat_template(self, conversation: Any, *args: Any, **options: Any) -> Any:
        Counting.written += len(conversation)
        return super().apply_chat_template(conversation, *args, **options)


@pytest.mark.parametrize("kind", ["chatml", "bare"])
def test_the_work_of_a_chat_grows_as_its_turns_do(kind: str) -> None:
    """A row of many short messages must not hold up those beside it."""
    whole = byte_tokenizer(TEMPLATES[kind])
    tokenizer = Counting(tokenizer_object=whole.backend_tokenizer, eos_token=END, chat_template=TEMPLATES[kind])
    spent = []
    for turns in (40, 80, 160):
        Counting.written = 0
        [found] = marked(rows(CHAT, {"chat": talk(["a"] * turns)}), tokenizer, CHAT)
        assert found == marked(rows(CHAT, {"chat": talk(["a"] * turns)}), whole, CHAT)[0]
        spent.append(Counting.written)
    assert spent[2] - spent[1] == 2 * (spent[1] - spent[0]) <= 80 * 8


def test_a_template_that_writes_the_date_writes_the_same_one_every_day() -> None:
    dated = byte_tokenizer(CHATML.replace("{% for", "{{ strftime_now('%d %b %Y') }}{% for", 1))
    [found] = marked(rows(CHAT, {"chat": talk(["a", "b"])}), dated, CHAT)
    assert dated.decode(found.ids).startswith("26 Jul 2024")
