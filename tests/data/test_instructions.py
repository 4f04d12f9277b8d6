"""Rows of instruction data: the columns that are read, what is refused in one line, and what goes back into a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsb.config.compose import load
from fedsb.config.schema import DataConfig
from fedsb.core.errors import UserError
from fedsb.data import Examples, load_corpus, load_site, shortened
from fedsb.data.instructions import columns_of, row_text, turns_of
from fedsb.data.tables import named_columns
from fedsb.data.writing import write_rows
from tests.data.chats import data, talk

Write = Callable[..., str]
PAIR, CHAT = ("data.prompt=question", "data.response=answer"), ("data.messages=chat",)
ALPACA, OWN = ("data.template=alpaca",), (r"data.template=Q: {question}\nA: {answer}",)
SYSTEM = "data.system='{who} says'"
GOOD: dict[tuple[str, ...], dict[str, Any]] = {
    PAIR: {"question": "1 + 1?", "answer": "2"},
    (*PAIR, SYSTEM): {"question": "1 + 1?", "answer": "2", "who": "it"},
    CHAT: {"chat": talk(["a", "b", "c", "d"], "be kind")},
    ALPACA: {"instruction": "add", "input": "1 1", "output": "2"},
    OWN: {"question": "1 + 1?", "answer": "2"},
}


def read(cfg: DataConfig, path: str) -> Examples:
    return load_site(cfg, path, ())


@pytest.mark.parametrize("way", GOOD, ids=lambda way: way[0])
def test_a_row_is_read_written_and_read_again(way: tuple[str, ...], table: Write, tmp_path: Path) -> None:
    cfg, row = data(*way), GOOD[way]
    assert named_columns(cfg) == row.keys()
    found = read(cfg, table([row, row | {"more": 7}]))
    assert [json.loads(text) for text in found.texts] == [row, row]
    write_rows(tmp_path / "again.jsonl", found, cfg, labels=())
    assert read(cfg, str(tmp_path / "again.jsonl")) == found


def test_chats_are_read_as_lists_and_as_json_text(table: Write, tmp_path: Path) -> None:
    cfg, chat = data(*CHAT), talk(["a", "b", "c", "d"])
    paths = [table([{"chat": chat}], "list.jsonl"), table([{"chat": json.dumps(chat)}], "text.jsonl"), str(tmp_path / "list.parquet")]
    pyarrow.parquet.write_table(pyarrow.table({"chat": [chat]}), paths[2])
    assert len({read(cfg, path).texts for path in paths}) == 1
    (text,) = read(cfg, paths[0]).texts
    assert [tuple(turn) for turn in turns_of(cfg, text)] == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_an_input_that_no_row_has_needs_no_column(table: Write) -> None:
    cfg = data(*ALPACA)
    assert columns_of(cfg) == {"instruction": "be full", "input": "be missing", "output": "be full"}
    (text,) = read(cfg, table([{"instruction": "add", "output": "2"}])).texts
    assert [turn.role for turn in turns_of(cfg, text)] == ["instruction", "output"]


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "no column of prompts": (PAIR, {"quest": "a", "answer": "b"}, r"^data\.prompt=question: .* no such column \(did you mean .quest"),
    "no column of a template": (OWN, {"question": "a", "reply": "b"}, r"^data\.template with column=answer: .* has no such column; it has"),
    "no column of a system text": ((*PAIR, SYSTEM), {"question": "a", "answer": "b"}, r"^data\.system with column=who: .* no such column"),
    "no response": (PAIR, {"question": "a", "answer": None}, r"^data\.response=answer: row 2 of .* is empty in that column"),
    "an empty response": (PAIR, {"question": "a", "answer": " "}, r"^data\.prompt: row 2 of .* holds an empty response; correct it or"),
    "an empty output": (ALPACA, {"instruction": "a", "output": ""}, r"^data\.template: row 2 of .* holds an empty output; correct it or"),
    "a number": (PAIR, {"question": "a", "answer": 2}, r"row 2 of .* holds 2 as response, which is no text"),
    "half of a character": (PAIR, {"question": "a\ud800", "answer": "b"}, r"row 2 of .* with half of a character"),
    "no chat": (CHAT, {"chat": "hello"}, r"^data\.messages: row 2 of .* holds 'hello', which is no list of messages \{role, content\}"),
    "another chat": (CHAT, {"chat": [{"from": "human", "value": "a"}]}, r"holds the message \{'from'.*; each has a role and a content"),
    "an unknown role": (
        CHAT, {"chat": [{"role": "assistent", "content": "a"}]},
        r"row 2 of .* holds the role 'assistent' \(did you mean 'assistant'\?\); known roles: system, user, assistant",
    ),
    "nobody answers": (CHAT, {"chat": talk(["a"])}, r"row 2 of .* holds nothing that an assistant says, and nothing to learn"),
    "an empty chat": (CHAT, {"chat": []}, r"row 2 of .* holds nothing that an assistant says"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_cannot_be_used_is_named_in_one_line(case: str, table: Write) -> None:
    way, row, message = REFUSED[case]
    rows = [row, row] if "column" in case else [GOOD[way], row]
    with pytest.raises(UserError, match=message) as caught:
        read(data(*way), table(rows))
    assert "\n" not in str(caught.value)


TEMPLATES = {
    r"^unknown data\.template 'alpacca' .*did you mean 'alpaca'": "alpacca",
    r"^data\.template holds '\{\}': a column is \{name\}": "a {} {b}",
    r"^data\.template holds '\{': a column is \{name\}": "a { b",
    r"^data\.template names a column twice": "{a} {a}",
}


@pytest.mark.parametrize("message", TEMPLATES)
def test_a_template_that_is_none_is_refused(message: str, table: Write) -> None:
    with pytest.raises(UserError, match=message):
        read(data(f"data.template='{TEMPLATES[message]}'"), table([GOOD[OWN]]))


WAYS: dict[str, list[str]] = {
    r"^data\.text=a and data\.prompt=b are given: one of data\.text, ": ["data.text=a", "data.prompt=b", "data.response=c"],
    r"^data\.messages=a and data\.template=alpaca are given: one of ": ["data.messages=a", "data.template=alpaca"],
    r"^nothing is given: one of ": ["data.text=null"],
    r"^data\.prompt=a without data\.response: add the column": ["data.prompt=a"],
    r"^data\.response=a without data\.prompt: add the column": ["data.response=a"],
    r"^data\.system goes with data\.prompt or data\.messages, not with data\.template|and data\.template is given": [
        "data.template=alpaca", "data.system=a",
    ],
    r"^data\.messages=a is for language models alone; add data\.task=causal_lm": ["data.messages=a", "data.task=classification"],
    r"^unknown data\.loss_on 'prompt'; choose from all, response": ["data.messages=a", "data.loss_on=prompt"],
}  # fmt: skip


@pytest.mark.parametrize("message", WAYS)
def test_examples_are_made_in_one_way(message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(["data=files", "data.path=a", "data.task=causal_lm", *WAYS[message]])


def test_a_response_without_a_prompt_is_no_way_beside_texts() -> None:
    with pytest.raises(UserError, match=r"without data\.prompt"):
        load(["data=files", "data.path=a", "data.task=causal_lm", "data.response=a"])


@pytest.mark.parametrize(
    ("given_", "length"),
    [((), 48), (("data.task=regression",), 48), (("data.task=causal_lm",), 512), (("model.task=causal_lm",), 512), (PAIR, 512)],
)
def test_what_an_example_keeps_suits_the_task(given_: tuple[str, ...], length: int) -> None:
    more = ("data.task=causal_lm", *given_) if given_ == PAIR else given_
    assert load(["data=files", "data.path=a", *more]).train.max_length == length
    assert load(["data=files", "data.path=a", *more, "train.max_length=9"]).train.max_length == 9


@given(
    contents=st.lists(st.text(alphabet="ab", min_size=1, max_size=9), min_size=2, max_size=6),
    most=st.integers(0, 40),
    turns=st.integers(2, 7),
)
def test_a_row_that_is_too_long_says_its_beginning(contents: list[str], most: int, turns: int) -> None:
    cfg = data(*CHAT)
    text = row_text(cfg, {"chat": talk(contents)})
    kept = turns_of(cfg, shortened(text, most, turns))
    assert len(kept) == min(turns, len(contents))
    assert "".join(turn.content for turn in kept) == "".join(contents[:turns])[:most]


def test_a_column_of_any_name_is_cut() -> None:
    cfg = data("data.prompt=role", "data.response=content")
    text = row_text(cfg, {"role": "a" * 50, "content": "b" * 50})
    assert "".join(turn.content for turn in turns_of(cfg, shortened(text, 60, 8))) == "a" * 50 + "b" * 10


def test_a_corpus_of_chats_is_split_and_thinned_as_any_other(table: Write) -> None:
    cfg = data(*PAIR, "data.max_examples=8", "data.test_fraction=0.25")
    corpus = load_corpus(replace(cfg, path=table([{"question": f"q{i}", "answer": f"a{i}"} for i in range(20)])), 0)
    assert (len(corpus.train), len(corpus.test)) == (6, 2)
