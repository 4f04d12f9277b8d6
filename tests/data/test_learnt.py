"""What is learnt of instruction data: all that an assistant says, its end, and nothing of a prompt but spaces before a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data import Corpus, Examples, answered, answered_corpus, marked, pad, tokenise_marked
from fedsb.data.framing import special_texts
from fedsb.data.instructions import row_text
from fedsb.tasks.task import TASKS
from tests.conftest import decoder_tokenizer
from tests.data.chats import CHATML, END, START, STOP, TEMPLATES, byte_tokenizer, data, joining_tokenizer, said, talk

LANGUAGE = TASKS["causal_lm"]
PAIR, CHAT = data("data.prompt=prompt", "data.response=response"), data("data.messages=chat")
WORDS = st.text(alphabet="ab hello.:\n", min_size=1).filter(lambda text: text.strip() == text)
TOKENIZERS = {name: byte_tokenizer(template) for name, template in TEMPLATES.items()}
law = settings(max_examples=25)
# What each ends an answer with inside of a conversation, and behind its last turn.
ENDS = {"none": (END, END), "chatml": (STOP, STOP), "closing": (STOP, STOP), "bare": ("\n", "\n" + END)}


def rows(cfg: DataConfig, *values: dict[str, Any]) -> Examples:
    return Examples(tuple(row_text(cfg, row) for row in values))


def learnt_of(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> list[str]:
    (found,) = marked(rows(cfg, row), tokenizer, cfg)
    return said(tokenizer, found.ids, found.learnt)


@pytest.mark.parametrize("kind", TEMPLATES)
@law
@given(contents=st.lists(WORDS, min_size=2, max_size=6), system=st.none() | WORDS)
def test_what_an_assistant_says_is_learnt_turn_by_turn_with_its_end(kind: str, contents: list[str], system: str | None) -> None:
    contents = contents[: len(contents) // 2 * 2]
    inner, last = ENDS[kind]
    found = learnt_of(CHAT, TOKENIZERS[kind], {"chat": talk(contents, system)})
    # A template that writes nothing where it is asked for an answer leaves it to the model who speaks.
    answers = [("a> " if kind == "bare" else "") + answer for answer in contents[1::2]]
    expected = [answer + inner for answer in answers[:-1]] + [answers[-1] + last]
    assert [text.lstrip(" ") for text in found] == expected
    assert all(text in (answer, " " + answer) for text, answer in zip(found, expected, strict=True))


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


@law
@given(
    prompt=st.text(alphabet="abc ", max_size=6),
    response=st.text(alphabet="abc ", min_size=1, max_size=6).filter(str.strip),
    pairs=st.lists(st.tuples(*[st.sampled_from("abc :")] * 2), unique=True, max_size=12),
)
def test_a_token_that_joins_prompt_and_response_is_not_learnt(prompt: str, response: str, pairs: list[tuple[str, str]]) -> None:
    """Against a walk over the tokens, letter by letter: a token is learnt when all of its letters are the response's."""
    tokenizer = joining_tokenizer(*pairs)
    cfg = data("data.template=:{prompt}{response}")
    (found,) = marked(rows(cfg, {"prompt": prompt, "response": response}), tokenizer, cfg)
    text = ":" + prompt + response
    start = len(text) - len(response)
    while start and text[start - 1] == " ":
        start -= 1
    place = 0
    assert found.ids[-1] == tokenizer.eos_token_id
    for i, learnt in zip(found.ids[:-1], found.learnt[:-1], strict=True):
        word = tokenizer.convert_ids_to_tokens(i)
        assert text[place : place + len(word)] == word
        assert learnt == (place >= start)
        place += len(word)
    assert place == len(text)
    assert found.learnt[-1] == 1


def test_the_joined_letters_are_nobodys() -> None:
    """The boundary is that of the whole text, in which the last letter of the prompt and the first of the response are one token."""
    tokenizer, cfg = joining_tokenizer(("b", "c")), data("data.template='{prompt}{response}'")
    (found,) = marked(rows(cfg, {"prompt": "ab", "response": "cd"}), tokenizer, cfg)
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["a", "bc", "d", END]
    assert found.learnt == [0, 0, 1, 1]


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


@law
@given(contents=st.lists(WORDS, min_size=2, max_size=4))
def test_all_tokens_are_learnt_where_that_is_asked_for(contents: list[str]) -> None:
    whole = data("data.messages=chat", "data.loss_on=all")
    row = {"chat": talk(contents[: len(contents) // 2 * 2])}
    for tokenizer in TOKENIZERS.values():
        (everything,), (responses,) = (marked(rows(cfg, row), tokenizer, cfg) for cfg in (whole, CHAT))
        assert everything.ids == responses.ids
        assert set(everything.learnt) == {1}
        assert set(responses.learnt) == {0, 1}


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


@law
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    limit=st.integers(2, 24),
)
def test_a_row_is_left_out_when_nothing_of_its_response_is_read(sizes: list[tuple[int, int]], limit: int) -> None:
    tokenizer, cfg = joining_tokenizer(), data("data.template='{prompt}{response}'")
    examples = rows(cfg, *({"prompt": "p" * prompt, "response": "r" * response} for prompt, response in sizes))
    whole = [[0] * prompt + [1] * (response + 1) for prompt, response in sizes]
    assert [row.learnt for row in marked(examples, tokenizer, cfg)] == whole
    assert [row["learnt"] for row in tokenise_marked(examples, tokenizer, cfg, limit)] == [row[:limit] for row in whole]
    left = [i for i, (prompt, _) in enumerate(sizes) if prompt < limit]
    if not left:
        with pytest.raises(UserError, match=f"train.max_length={limit}: .* the training part, .* are {min(p for p, _ in sizes) + 1};"):
            answered(examples, tokenizer, cfg, limit, part="train")
        return
    assert answered(examples, tokenizer, cfg, limit, part="train") == examples.take(left)
    corpus = Corpus(train=examples, test=examples, public=None, labels=())
    kept = answered_corpus(corpus, tokenizer, cfg, limit, every_row=True)
    dropped = {"test": len(sizes) - len(left)} if len(left) < len(sizes) else {}
    assert (kept.train, kept.test, kept.dropped) == (examples, examples.take(left), dropped)


def slow(logits: Tensor, row: dict[str, list[int]]) -> list[float]:
    """Return the negative log-likelihood of each learnt token of one row, token by token."""
    found = []
    for place, (token, learnt) in enumerate(zip(row["input_ids"], row["learnt"], strict=True)):
        if place and learnt:
            found.append(-float(torch.log_softmax(logits[place - 1].double(), 0)[token]))
    return found


@law
@given(
    chats=st.lists(st.lists(WORDS, min_size=2, max_size=4), min_size=1, max_size=4),
    limit=st.integers(4, 60),
    kind=st.sampled_from([*TEMPLATES]),
)
def test_no_token_of_a_prompt_has_a_loss_or_a_gradient(chats: list[list[str]], limit: int, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    examples = rows(CHAT, *({"chat": talk(chat[: len(chat) // 2 * 2])} for chat in chats))
    features = tokenise_marked(examples, tokenizer, CHAT, limit)
    batch = pad(features, tokenizer)
    generator = torch.Generator().manual_seed(len(chats) + limit)
    logits = torch.randn(*batch["input_ids"].shape, len(tokenizer), generator=generator, requires_grad=True)
    each = [slow(row, dict(feature)) for row, feature in zip(logits.detach(), features, strict=True)]
    nll = [value for row in each for value in row]
    assert LANGUAGE.terms(batch) == len(nll)
    loss = LANGUAGE.loss(logits, batch)
    assert float(loss.detach()) == pytest.approx(sum(nll) / max(1, len(nll)), rel=1e-5)
    own = [sum(row) / max(1, len(row)) for row in each]
    assert LANGUAGE.losses(logits, batch).detach().tolist() == pytest.approx(own, rel=1e-5)
    assert LANGUAGE.record(logits, batch).tolist() == [pytest.approx([sum(row), len(row)], rel=1e-5) for row in each]
    (gradient,) = torch.autograd.grad(loss, logits)
    moved = gradient.abs().sum(-1) > 0
    learnt = torch.nn.functional.pad(batch["learnt"][:, 1:], (0, 1)) > 0
    assert torch.equal(moved, learnt)


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


def test_a_row_that_says_nothing_is_one_token_that_is_not_learnt() -> None:
    for tokenizer in (*TOKENIZERS.values(), decoder_tokenizer()):
        for row in tokenise_marked(Examples(("",)), tokenizer, CHAT, 8):
            assert (len(row["input_ids"]), row["learnt"]) == (1, [0])


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
