"""Mistakes with language models, by the command line: one line, status 2, and what was there is there still."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging as hf_logging

from fedsb.models.build import forget_models
from tests.architectures import checkpoint
from tests.commands.calls import Call, first_line
from tests.conftest import FILLERS

PAIR = ["data.prompt=q", "data.response=a"]
ROW = {"q": "goal", "a": "bank", "talk": [{"role": "user", "content": "goal"}, {"role": "assistant", "content": "bank"}]}


def asked(path: Path, *rows: dict[str, Any]) -> str:
    """Write a table of some good rows and those that are given."""
    good = [{**ROW, "q": f"{a} {b}"} for a in FILLERS[:4] for b in FILLERS[:5]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, *({**ROW, **row} for row in rows)]), encoding="utf-8")
    return f"data.path='{path}'"


@pytest.fixture
def quick(tiny_llama: Path) -> list[str]:
    """A federation of two rounds on a tiny language model; the table comes beside."""
    return [
        "model=pretrained", f"model.name='{tiny_llama}'", "data=files", "data.task=causal_lm", "device=cpu", "rank=2", "plots=false",
        "federation.num_clients=2", "federation.num_rounds=2", "train.local_steps=1", "init.kind=orthogonal", "train.max_length=24",
    ]  # fmt: skip


MISTAKES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "an unknown role": (
        ["data.messages=talk"],
        {"talk": [{"role": "bot", "content": "goal"}]},
        "data.messages: row 21 of the training part holds the role 'bot'; known roles: system, user, assistant; correct it",
    ),
    "no list of messages": (
        ["data.messages=talk"],
        {"talk": "goal"},
        "data.messages: row 21 of the training part holds 'goal', which",
    ),
    "an empty response": (
        PAIR,
        {"a": " "},
        "data.prompt: row 21 of the training part holds an empty response; correct it or remove",
    ),
    "no response": (PAIR, {"a": None}, "data.response=a: row 21 of the training part is empty in that column"),
    "a template of a missing column": (
        ["data.template='{q}: {answer}'"],
        {},
        "data.template with column=answer: the training part has no such column; it has q, a, talk",
    ),
    "a system text of a missing column": ([*PAIR, "data.system='{who}'"], {}, "data.system with column=who: the training part has no such"),
    "a column of choices for a template": (
        ["data.template='{q}: {a}'", "data.choices=q"],
        {},
        "data.choices=q: that column is written in prompt or response; give the choices one of their own",
    ),
    "a letter for a choice": (
        [*PAIR, "data.choices=c"],
        {"a": "B", "c": ["goal", "bank"]},
        "data.prompt: row 21 of the training part holds the response 'B', which is none of the choices ['goal', 'bank']; correct it",
    ),
    "nothing left of any response": (
        [*PAIR, "train.max_length=4"],
        {},
        "train.max_length=4: 4 tokens leave nothing of any response in the training part, where the shortest prompt and the first token of",
    ),
    "an empty stop text": ([*PAIR, "eval.stop=['']"], {}, "eval.stop holds an empty text, which every response begins with; leave it out"),
    "packing under privacy": (
        [*PAIR, "train.packing=true", "privacy=example", "privacy.epsilon=3"],
        {},
        "train.packing=true with privacy=example: each gradient is clipped by itself, and those of one row are not told apart; leave",
    ),
    "a file that is no GGUF": ([*PAIR, "model.name=torn.gguf"], {}, "'torn.gguf' can't be read as a GGUF model"),
    "a model that is gone": ([*PAIR, "model.name=./gone"], {}, "model.name=./gone: no such folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(call: Call, quick: list[str], tmp_path: Path, case: str) -> None:
    more, row, said = MISTAKES[case]
    Path("torn.gguf").write_bytes(b"GGUF torn")
    status, out, err = call("run", *quick, asked(tmp_path / "rows.jsonl", row), *more, "output=run")
    assert status == 2
    assert first_line(err).replace(f"{tmp_path}/", "").startswith(f"error: {said}"), err
    assert len(err.splitlines()) == 1
    assert "round 0" not in out
    assert not Path("run").exists()


def test_a_model_that_cannot_keep_packed_examples_apart_is_a_mistake(call: Call, quick: list[str], tmp_path: Path) -> None:
    model = f"model.name='{checkpoint('mamba', tmp_path / 'mamba')}'"
    hf_logging.warning_once.cache_clear()  # of kernels that are not there, said once a process
    status, _, err = call("run", *quick, asked(tmp_path / "rows.jsonl"), *PAIR, model, "train.packing=true", "output=run")
    assert status == 2
    assert first_line(err).startswith("error: train.packing=true: ")
    assert not Path("run").exists()


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this processor multiplies in float16")
def test_float16_where_a_processor_has_none_is_a_mistake(call: Call, quick: list[str], tmp_path: Path) -> None:
    status, _, err = call("run", *quick, asked(tmp_path / "rows.jsonl"), *PAIR, "model.dtype=float16", "output=run")
    assert status == 2
    assert first_line(err).startswith("error: model.dtype=float16")
    assert not Path("run").exists()


def test_what_a_run_was_made_of_may_be_gone_when_it_is_measured_or_exported(call: Call, quick: list[str], tmp_path: Path) -> None:
    """Neither takes anything from the run, and it is measured again once its model is there."""
    model = checkpoint("llama", tmp_path / "llama")
    status, _, err = call("run", *quick, asked(tmp_path / "rows.jsonl"), *PAIR, f"model.name='{model}'", "output=run")
    assert status == 0, err
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    moved = model.rename(tmp_path / "moved")
    forget_models()
    for command in (["eval", "run"], ["export", "run", "out"]):
        status, _, err = call(*command)
        assert (status, len(err.splitlines())) == (2, 1), err
        assert first_line(err).startswith(f"error: model.name={model}: no such folder"), err
    assert not Path("out").exists()
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    Path("run/summary.json").rename(tmp_path / "summary.json")
    status, _, err = call("export", "run", "out")
    assert (status, len(err.splitlines())) == (2, 1), err
    assert "has not finished" in err
    (tmp_path / "summary.json").rename("run/summary.json")
    status, out, err = call("eval", "run", f"model.name='{moved}'", "--max-examples", "2", "eval.max_new_tokens=4")
    assert status == 0, err
    assert all(f"| {name} " in out for name in ("exact_match", "parse_failures", "chance", "examples"))
