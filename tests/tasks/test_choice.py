"""Multiple choice: likelihoods against a loop over transformers' own, accuracies against their definition, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from fedsb.app.assembly import model_of, tokenizer_of
from fedsb.app.measuring.scoring import check_scores, choices, figures, samples
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.data import continuations, load_corpus
from fedsb.data.instructions import RowError, columns_of, row_text
from fedsb.data.prompts import start_id
from fedsb.tasks.choice import Choice, choice_metrics
from tests.data.chats import CHATML, END, START, byte_tokenizer, data, joining_tokenizer

ROWS = [
    {"q": "goal match", "a": "team", "c": ["team", "bank market price", "tax"]},
    {"q": "bank", "a": "market price", "c": ["goal", "market price"]},
    {"q": "a new film of the year", "a": "actor", "c": ["scene", "studio", "screen", "actor"]},
]


def configured(folder: Path, model: Path, rows: list[dict[str, object]], *more: str) -> Config:
    path = folder / f"{len(rows)} choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["data=files", f"data.path='{path}'", f"data.test_path='{path}'", "data.task=causal_lm", "data.prompt=q", "data.response=a"]
    given = ["data.choices=c", "eval.scores=[choice]", "model=pretrained", f"model.name='{model}'", "rank=2", "device=cpu"]
    return load([*files, *given, *more])


@pytest.mark.parametrize("more", [(), ("data.prompt=null", "data.response=null", "data.template='{q}: {a}'")], ids=["prompt", "template"])
def test_an_answers_likelihood_is_that_of_its_tokens_behind_the_prompt(tmp_path: Path, tiny_llama: Path, more: tuple[str, ...]) -> None:
    config = configured(tmp_path, tiny_llama, ROWS, *more)
    adapted, tokenizer = model_of(config, ()), tokenizer_of(config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        head = dict(adapted.model.named_parameters())["lm_head.weight"]
        head.copy_(torch.randn_like(head))
    found = choices(config, adapted)
    for row, choice in zip(ROWS, found, strict=True):
        assert choice.lengths == tuple(map(len, row["c"]))
        assert choice.right == row["c"].index(row["a"])
        prompt = tokenizer(f"{row['q']}: " if more else f"User: {row['q']}\nAssistant:").input_ids
        for text, likelihood in zip(row["c"], choice.likelihoods, strict=True):
            answer = tokenizer(text, add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = adapted.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            slow = sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))
            assert likelihood == pytest.approx(slow, rel=1e-4)
    scores = figures(samples(config, adapted, 0))
    assert list(scores) == ["loss", "perplexity", "accuracy_norm", "accuracy", "choice_chance", "examples"]
    assert {name: scores[name] for name in list(scores)[2:]} == choice_metrics(found)
    kept = samples(config, adapted, 0)[1].items
    assert {name: column.mean() for name, column in kept.items()} == {name: scores[name] for name in ("accuracy_norm", "accuracy")}
    assert scores["choice_chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4) / 3)


def test_long_answers_are_not_held_against_themselves_where_lengths_count() -> None:
    rows = [Choice((-4.0, -6.0), (2, 6), 1), Choice((-4.0, -3.0), (4, 1), 0), Choice((-1.0, -1.0), (2, 2), 0)]
    found = choice_metrics(rows)
    assert found == {"accuracy_norm": 1.0, "accuracy": 1 / 3, "choice_chance": 0.5, "examples": 3.0}


MISTAKES = {
    "no list": ({"c": "team"}, r"data.prompt: row 4 of the .* part holds 'team', which is no list of texts; correct it"),
    "one": ({"c": ["team"]}, r"row 4 of the .* part holds the choices \['team'\]; two at least are needed, each once; correct it"),
    "twice": ({"c": ["team", "team"]}, r"row 4 of the .* part holds the choices \['team', 'team'\]; two at least are needed, each once"),
    "others": ({"c": ["bank", "tax"]}, r"row 4 of the .* part holds the response 'team', which is none of the choices \['bank', 'tax'\]"),
    "a letter": ({"a": "B", "c": ["bank", "tax"]}, r"row 4 of the .* part holds the response 'B', which is none of the choices"),
    "an index": ({"a": "1", "c": ["bank", "tax"]}, r"row 4 of the .* part holds the response '1', which is none of the choices"),
    "a number": ({"c": ["team", 3]}, r"row 4 of the .* part holds 3 as choice, which is no text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_choices_that_are_none_are_one_line(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    row, said = MISTAKES[name]
    with pytest.raises(UserError, match=said) as caught:
        load_corpus(configured(tmp_path, tiny_llama, [*ROWS, {"q": "goal", "a": "team", **row}]).data, 0)
    assert "\n" not in str(caught.value)


JOINED = joining_tokenizer((":", "y"), ("s", "!"), ("q", "a"))


def counted(template: str, row: dict[str, object], tokenizer: PreTrainedTokenizerBase = JOINED) -> tuple[list[list[str]], int]:
    """Return the tokens of each choice that count, and which is right."""
    cfg = data(f"data.template='{template}'", "data.choices=c")
    found, right = continuations(row_text(cfg, row), tokenizer, cfg)
    kept = [[i for i, counts in zip(each.ids, each.answer, strict=True) if counts] for each in found]
    assert all(not each.answer[0] for each in found)  # nothing comes before it that could tell of it
    return [tokenizer.convert_ids_to_tokens(ids) for ids in kept], right


def test_no_letter_of_an_answer_is_left_out_where_a_token_joins_it_to_what_stands_around() -> None:
    """All choices are given the same tokens, so that what is joined in one of them counts in the others too."""
    assert counted("{q}: {a}", {"q": "q", "a": "y", "c": ["no", "y"]}) == ([[" ", "n", "o"], [" ", "y"]], 1)
    assert counted("{q}:{a}", {"q": "q", "a": "y", "c": ["no", "y"]}) == ([[":", "n", "o"], [":y"]], 1)
    assert counted("{q}:{a}", {"q": "q", "a": "yo", "c": ["yes", "yo"]}) == ([[":y", "e", "s"], [":y", "o"]], 1)
    assert counted("{q}: {a}!", {"q": "q", "a": "s", "c": ["s", "t"]}) == ([[" ", "s!"], [" ", "t"]], 0)
    assert counted("{q}{a}", {"q": "q", "a": "ab", "c": ["ab", "b"]}) == ([["qa", "b"], ["q", "b"]], 0)
    assert counted("{a}", {"a": "b", "c": ["ab", "b"]}) == ([["a", "b"], ["b"]], 1)


def test_what_a_chat_template_writes_before_each_answer_counts_for_none() -> None:
    """It is the same for all, and would be held against the shorter ones where lengths count."""
    own = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
    thought = own.replace(
        "message['content']", "('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') + message['content']"
    )
    tokenizer, cfg = byte_tokenizer(CHATML.replace(own, thought)), data("data.prompt=q", "data.response=a", "data.choices=c")
    assert "think" in tokenizer.chat_template
    found, _ = continuations(row_text(cfg, {"q": "one", "a": "no", "c": ["no", "hello there"]}), tokenizer, cfg)
    kept = [[i for i, counts in zip(each.ids, each.answer, strict=True) if counts] for each in found]
    assert [tokenizer.decode(ids) for ids in kept] == ["no", "hello there"]


def test_a_choice_of_which_a_tokenizer_makes_nothing_is_not_scored() -> None:
    tokenizer, cfg = byte_tokenizer(), data("data.template='{q}:{a}'", "data.choices=c")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(RowError, match="a choice without a token of its own"):
        continuations(row_text(cfg, {"q": "one", "a": "two", "c": ["\u200b", "two"]}), tokenizer, cfg)


def test_an_answer_without_a_prompt_goes_on_from_the_token_that_begins_texts() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token, tokenizer.pad_token = END, START
    assert tokenizer.bos_token_id == 0
    assert start_id(tokenizer) == 0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": "q", "a": "é", "c": ["é", "ü"]}, r"the choices 'é' and 'ü', the same to the tokenizer"),
        ({"q": "q", "a": "B", "c": ["no", "yes"]}, r"the response 'B', which is none of the choices"),
    ],
)
def test_what_a_tokenizer_cannot_tell_apart_is_not_scored(row: dict[str, object], said: str) -> None:
    cfg = data("data.template='{q}: {a}'", "data.choices=c")
    with pytest.raises(RowError) as caught:
        continuations(json.dumps(row), JOINED, cfg)
    assert re.search(said, caught.value.detail)


@pytest.mark.parametrize("more", [{"right": 2}, {"right": -1}, {"lengths": (1,)}, {"lengths": (0, 3)}])
def test_a_right_answer_that_nobody_looked_at_is_no_question(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"likelihoods"):
        Choice(**{"likelihoods": (-1.0, -2.0), "lengths": (2, 3), "right": 1, **more})


@pytest.mark.parametrize("column", ["q", "a", "s"])
def test_choices_have_a_column_of_their_own(column: str) -> None:
    cfg = data("data.prompt=q", "data.response=a", "data.system='{s}'", f"data.choices={column}")
    with pytest.raises(UserError, match=rf"^data.choices={column}: that column is written in prompt or response; give the choices one of"):
        columns_of(cfg)


def test_rows_without_choices_can_be_learnt_and_not_scored(tmp_path: Path, tiny_llama: Path) -> None:
    config = configured(tmp_path, tiny_llama, [*ROWS, {"q": "goal", "a": "team", "c": None}])
    assert len(load_corpus(config.data, 0).train) == 4
    with pytest.raises(
        UserError, match=r"^data.choices=c: 1 of 4 test rows have nothing in that column; name another, or leave choice out"
    ):
        check_scores(config, model_of(config, ()))
    long = configured(tmp_path, tiny_llama, [{**ROWS[0], "c": ["team", "goal " * 50]}, ROWS[1]])
    with pytest.raises(UserError, match=r"^data.choices=c: a prompt with its answer has \d\d tokens, and the model reads 48$"):
        check_scores(long, model_of(long, ()))


def test_the_configuration_says_what_goes_together(tmp_path: Path, tiny_llama: Path) -> None:
    for more, said in {
        "data.choices=null": r"^eval.scores=\[choice\] without data.choices: name the column",
        "data.prompt=null data.response=null data.messages=m": r"^data.choices=c goes with data.prompt and data.response, or with ",
    }.items():
        with pytest.raises(UserError, match=said):
            configured(tmp_path, tiny_llama, ROWS, *more.split())
