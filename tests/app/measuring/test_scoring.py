"""Scores of a run: of which responses, by which rule, when, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedsb.app.assembly import features_of, model_of, task_of
from fedsb.app.assembly import measured_examples as examples_of
from fedsb.app.measuring.scoring import answers, check_scores, decoding_of, figures, samples
from fedsb.app.measuring.scoring import measured_prompts as prompts_in
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.models.evaluate import evaluate
from fedsb.run.predictions import read_predictions
from tests.app.runs import federated


def configured(asked: list[str], *more: str) -> Config:
    return load([*asked, *more])


def test_a_run_says_what_its_model_answers_before_and_after(asked: list[str], tmp_path: Path) -> None:
    """The base first; a model that has learnt the commonest answer alone scores the chance level, and all stand beside the loss."""
    summary, rounds = federated(tmp_path / "run", [*asked, "eval.max_examples=8"])
    assert [list(found) for found in rounds] == [["loss", "perplexity", "exact_match", "parse_failures", "chance", "examples"]] * 3
    assert {(found["chance"], found["examples"]) for found in rounds} == {(0.75, 8.0)}
    assert rounds[0]["exact_match"] < 0.75 == rounds[2]["exact_match"]
    assert summary["metrics"] == rounds[2]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| scores | scores ['exact_match'], scorer auto, max_new_tokens 6, temperature 0.0 |" in report
    assert "exact_match **0.750**" in report
    assert "examples **8**" in report
    log = (tmp_path / "run" / "run.log").read_text()
    assert "exact match on 8 test rows by eval.scorer=answer, of responses of up to 6 tokens; always giving the commonest" in log
    assert "exact_match 0.750  parse_failures 0.000  chance 0.750  examples 8  " in log


def test_what_is_cut_and_left_out_is_said_before_the_first_round(asked: list[str], tmp_path: Path) -> None:
    rows = [{"q": "goal " * length, "a": "goal bank goal"} for length in (*[1] * 6, *[12] * 3, 30)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    own = [text for text in asked if not text.startswith(("data.path", "federation.", "train.max_length"))]
    more = [f"data.path='{tmp_path / 'long.jsonl'}'", f"data.test_path='{tmp_path / 'long.jsonl'}'", "train.max_length=18"]
    federated(tmp_path / "run", [*own, *more, "federation.num_clients=2", "federation.num_rounds=1", "eval.scores=[]"])
    said = (tmp_path / "run" / "run.log").read_text().splitlines()
    first = next(i for i, line in enumerate(said) if "round 0/1" in line)
    assert any("left out: 1 of 10 train rows, 1 of 10 test rows, of whose responses 18 tokens" in line for line in said[:first])
    cut = "33% of the training texts are longer than train.max_length=18 tokens: the ends of their responses are cut off"
    assert any(cut in line for line in said[:first]), said[:first]


def test_a_run_keeps_what_its_model_answers_to_each_row(asked: list[str], tmp_path: Path) -> None:
    """The metrics of the last round are means of what is kept, the loss's one over tokens."""
    summary, _ = federated(tmp_path / "run", [*asked, "eval.max_examples=8"])
    kept = read_predictions(tmp_path / "run")
    assert kept is not None
    assert (kept.round, kept.items) == (2, examples_of(configured(asked, "eval.max_examples=8")).sha256())
    for name in ("loss", "exact_match", "parse_failures"):
        values, weights = kept.measured(name)
        assert len(values) == 8
        assert (values * weights).sum() / weights.sum() == pytest.approx(summary["metrics"][name], abs=1e-6)
    assert kept.columns["loss_weight"].min() >= 1


def test_scores_are_of_the_rows_that_the_loss_is_of_and_of_none_unless_asked(asked: list[str]) -> None:
    config = configured(asked, "eval.max_examples=5")
    adapted = model_of(config, ())
    assert [prompt.reference for prompt in prompts_in(config)] == [json.loads(row)["a"] for row in examples_of(config).texts]
    loss = evaluate(adapted, task_of(config), features_of(config, examples_of(config)), train=config.train)
    silent = configured(asked, "eval.max_examples=5", "eval.scores=[]")
    assert figures(samples(silent, adapted, 0)) == loss
    assert list(figures(samples(config, adapted, 0)).items())[:2] == list(loss.items())
    assert check_scores(silent, adapted) == ""


def test_what_is_sampled_follows_from_seed_and_round(asked: list[str]) -> None:
    config = configured(asked, "eval.max_examples=5", "eval.temperature=3", "eval.top_p=0.9")
    adapted = model_of(config, ())
    said = [[answer.response for answer in answers(config, adapted, number)] for number in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("text", [r"eval.stop=['goal\n',x]", r'eval.stop=["goal\n",x]', "eval.stop=['goal\n',x]"])
def test_a_line_feed_can_be_typed_as_the_two_characters_that_shells_leave(asked: list[str], text: str) -> None:
    """As in each option that is a text."""
    config = configured(asked, text, r"data.system='Be\nbrief.'")
    assert decoding_of(config).stop == ("goal\n", "x")
    assert prompts_in(config)[0].text.startswith("System: Be\nbrief.\nUser: ")


MISTAKES = {
    "eval.stop=['']": "eval.stop holds an empty text, which every response begins with; leave it out",
    "eval.scores=[bleu]": "unknown score in eval.scores 'bleu'; choose from choice, exact_match",
    "eval.scorer=last": "unknown eval.scorer 'last' (did you mean 'last_number'?); choose from answer, auto, gsm8k, last_number, regex, ",
    "eval.scorer=regex": "eval.scorer=regex with eval.pattern=null: add eval.pattern=",
    "eval.pattern=x": "eval.scorer=auto with eval.pattern=x: add eval.scorer=regex, or leave the pattern out",
    "eval.scorer=regex eval.pattern='(x'": "eval.pattern=(x is no regular expression (missing ), unterminated subpattern at position 0)",
    "eval.top_p=0.5": "eval.top_p=0.5 with eval.temperature=0, which draws nothing; add eval.temperature=1, or leave top_p out",
    "eval.max_new_tokens=0": "eval.max_new_tokens=0 is out of range; it must be at least 1",
    "method=fedsa_lora federation.evaluate_clients=true data.client_test_fraction=0.1": "eval.scores=[exact_match] with method",
    "data.prompt=null data.response=null": "eval.scores=[exact_match] with data.text=text: nothing tells a response from its prompt",
    "data.task=classification data.prompt=null data.response=null": "eval.scores=[exact_match] is for language models, and the task",
}


@pytest.mark.parametrize("said", MISTAKES)
def test_what_does_not_go_together_is_one_line(asked: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        configured([text for text in asked if text.split("=")[0] not in said], *said.split())
    assert str(caught.value).startswith(MISTAKES[said])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "eval.max_new_tokens=44",
            r"=44: the longest prompt of the test part has \d tokens, and the model reads 48 in all;",
        ),
        (
            "eval.scorer=gsm8k",
            r"=gsm8k finds no answer in a response of the test part \('(goal|bank)'\); choose from last_number",
        ),
    ],
)
def test_what_cannot_be_scored_ends_a_run_before_anything_is_written(asked: list[str], tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        federated(tmp_path / "run", [*asked, more])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"q": "goal " * 43, "a": "goal"}], [], r"the longest prompt of the validation part has \d+ tokens, and the model reads 48"),
        (
            [{"q": "bank", "a": "#### 1"}, {"q": "team", "a": "goal"}],
            ["eval.scorer=gsm8k"],
            r"eval.scorer=gsm8k finds no answer in a response of the validation part \('goal'\)",
        ),
    ],
)
def test_a_validation_part_that_cannot_be_scored_ends_a_run_before_it_begins(
    asked: list[str], tmp_path: Path, rows: list[dict[str, str]], more: list[str], said: str
) -> None:
    for name, each in (("validation", rows), ("test", [{"q": "goal", "a": "#### 2"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each), encoding="utf-8")
    paths = [f"data.{name}_path='{tmp_path / name}.jsonl'" for name in ("validation", "test")]
    with pytest.raises(UserError, match=said):
        federated(tmp_path / "run", [*asked, *paths, "eval.select=loss", *more])
    assert not (tmp_path / "run").exists()
