"""Multiple choice: likelihoods against a loop over transformers' own, accuracies against their definition, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedsb.app.assembly import model_of, tokenizer_of
from fedsb.app.measuring.scoring import check_scores, choices, figures, samples
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.data import load_corpus
from fedsb.tasks.choice import Choice, choice_metrics

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
    "a number": ({"c": ["team", 3]}, r"row 4 of the .* part holds 3 as choice, which is no text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_choices_that_are_none_are_one_line(tmp_path: Path, tiny_llama: Path, name: str) -> None:
    row, said = MISTAKES[name]
    with pytest.raises(UserError, match=said) as caught:
        load_corpus(configured(tmp_path, tiny_llama, [*ROWS, {"q": "goal", "a": "team", **row}]).data, 0)
    assert "\n" not in str(caught.value)


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
