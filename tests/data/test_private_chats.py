"""Under example-level privacy a chat that cannot be used is one token without a loss, and moves no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.own_rows import CELLS, EXAMPLES, GOOD, JSON, Configure, features, only_its_own, written

CHATS = ("data.task=causal_lm", "data.messages=chat", "data.label=null", "data.labels=null")
TURNS = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "bot"]), "content": CELLS}), max_size=4)


@EXAMPLES
@given(place=st.integers(0, 6), chat=JSON | TURNS | TURNS.map(json.dumps))
def test_a_chat_flipped_to_anything_moves_no_other(place: int, chat: Any, configured: Configure, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": label}] for text, label in GOOD]
    lines = [json.dumps({"chat": each}) for each in turns]
    only_its_own(configured(*CHATS), tmp_path / "a.jsonl", lines, place, json.dumps({"chat": chat}))


CHATLESS: dict[str, tuple[Any, str]] = {
    "no list": (7, "no list of messages"),
    "an unknown role": ([{"role": "bot", "content": "a"}], "an unknown role"),
    "no answer": ([{"role": "user", "content": "a"}], "an empty response"),
    "no messages": (None, "no list of messages"),
    "half of a character": ([{"role": "assistant", "content": "\ud800"}], "half of a character"),
}


@pytest.mark.parametrize("case", CHATLESS)
def test_a_chat_that_cannot_be_used_is_one_token_without_a_loss(
    case: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat, why = CHATLESS[case]
    answered = [{"role": "user", "content": "new goal"}, {"role": "assistant", "content": "actor"}]
    long = [{"role": "user", "content": "goal " * 60}, {"role": "assistant", "content": "actor"}]
    lines = [json.dumps({"chat": each}) for each in (answered, chat, answered, long)]
    found = features(configured(*CHATS), written(tmp_path / "a.jsonl", lines))
    assert [any(row["learnt"]) for row in found] == [True, False, True, False]
    assert (len(found[1]["input_ids"]), len(found[3]["input_ids"])) == (1, 12)
    assert f"1 of 4 rows cannot be used and take part without a loss (row 2: {why})" in caplog.text
    assert "train.max_length leaves nothing of 1 responses; these rows take part without a loss: 4" in caplog.text
