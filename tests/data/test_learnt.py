"""What is learnt of instruction data: all that an assistant says, its end, and nothing of a prompt but spaces before a response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsb.core.errors import UserError
from fedsb.data import Corpus, Examples, answered, answered_corpus, marked, pad, tokenise_marked
from fedsb.tasks.task import TASKS
from tests.conftest import decoder_tokenizer
from tests.data.chats import END, STOP, TEMPLATES, data, joining_tokenizer, talk
from tests.data.learnt import CHAT, TOKENIZERS, WORDS, law, learnt_of, rows

LANGUAGE = TASKS["causal_lm"]
# What each ends an answer with inside of a conversation, and behind its last turn.
ENDS = {"none": (END, END), "chatml": (STOP, STOP), "closing": (STOP, STOP), "bare": ("\n", "\n" + END)}


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


def test_a_row_that_says_nothing_is_one_token_that_is_not_learnt() -> None:
    for tokenizer in (*TOKENIZERS.values(), decoder_tokenizer()):
        for row in tokenise_marked(Examples(("",)), tokenizer, CHAT, 8):
            assert (len(row["input_ids"]), row["learnt"]) == (1, [0])
