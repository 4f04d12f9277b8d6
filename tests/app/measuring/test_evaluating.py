"""``fedsb eval``: the figures of the run again, beside its base, from a run's folder or an exported model's."""

from __future__ import annotations

import json
import re
import shutil
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsb.app.assembly import measured_features as features_of_test
from fedsb.app.exports.on_request import export
from fedsb.app.measuring.evaluating import evaluation
from fedsb.app.measuring.lm_eval import harness
from fedsb.cli import main
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.models.build import forget_models
from fedsb.report.evaluation import Figure
from tests.app.runs import federated
from tests.conftest import FILLERS

RUN = "eval.max_examples=8"


@pytest.fixture(scope="module")
def done(asked: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("done") / "run"
    return folder, federated(folder, [*asked, RUN, "method=fed_sb", "init.kind=orthogonal"])[1]


@pytest.fixture
def run(done: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> tuple[Path, list[dict[str, float]]]:
    """A finished run, and its metrics by round."""
    forget_models()
    return Path(shutil.copytree(done[0], tmp_path / "run")), done[1]


def values(figures: dict[str, Figure | None]) -> dict[str, float]:
    return {name: figure.value for name, figure in figures.items() if figure is not None}


def columns(found: Any) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    rows = found.rows
    sides = ({row.metric: getattr(row, side) for row in rows} for side in ("base", "model", "difference"))
    base, model, difference = (values(side) for side in sides)
    return base, model, difference


def test_a_run_is_measured_again_beside_its_base(run: tuple[Path, list[dict[str, float]]], asked: list[str]) -> None:
    folder, rounds = run
    found = evaluation(folder)
    base, model, difference = columns(found)
    assert base == pytest.approx(rounds[0], abs=1e-6)
    assert model == pytest.approx(rounds[-1], abs=1e-6)
    assert difference == pytest.approx({name: model[name] - base[name] for name in base if name not in ("chance", "examples")})
    assert [row.metric for row in found.rows][-1] == "examples"
    assert found.names == ("untouched base", "fed_sb, round 2")
    lines = [json.loads(line) for line in found.answers]
    assert len(lines) == 8
    assert sum(line["fed_sb, round 2"]["right"] for line in lines) / 8 == model["exact_match"]
    assert {line["reference"] for line in lines} == {"goal", "bank"}


def test_the_base_is_the_model_that_nobody_has_touched(
    run: tuple[Path, list[dict[str, float]]], asked: list[str], tiny_llama: Path
) -> None:
    """Against transformers alone, a row at a time."""
    model, total, count = AutoModelForCausalLM.from_pretrained(tiny_llama), 0.0, 0
    for row in features_of_test(load([*asked, RUN])):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        learnt = [i for i, kept in enumerate(row["learnt"]) if kept]
        total -= sum(float(logits[i - 1, row["input_ids"][i]]) for i in learnt)
        count += len(learnt)
    base, _, _ = columns(evaluation(run[0], tasks=["loss"]))
    assert base["loss"] == pytest.approx(total / count, rel=1e-5)


def test_an_exported_model_scores_what_its_run_did(run: tuple[Path, list[dict[str, float]]], asked: list[str], tmp_path: Path) -> None:
    folder, rounds = run
    inside, _ = export(folder, folder / "merged")
    base, model, _ = columns(evaluation(inside))
    assert base == pytest.approx(rounds[0], abs=1e-5)
    assert model == pytest.approx(rounds[-1], abs=1e-5)
    away = Path(shutil.copytree(inside, tmp_path / "elsewhere"))
    data = [text for text in asked if text.startswith(("data", "eval"))]
    found = evaluation(away, [*data, RUN, "device=cpu"])
    assert {row.base for row in found.rows} == {None}
    assert columns(found)[1] == pytest.approx(rounds[-1], abs=1e-5)
    assert found.remarks[0].startswith("there is no base beside it")


def test_what_is_measured_can_be_chosen(run: tuple[Path, list[dict[str, float]]]) -> None:
    folder, _ = run
    _, model, _ = columns(evaluation(folder, ["eval.max_examples=3", "eval.scorer=regex", "+eval.pattern=(go|ba)"], ["exact_match"]))
    assert set(model) == {"exact_match", "parse_failures", "chance", "examples"}
    assert model["examples"] == 3


def test_rows_that_are_left_out_are_said(run: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    folder, _ = run
    rows = [{"q": "goal " * length, "a": "goal"} for length in (1, 2, 30)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluation(folder, [f"data.test_path='{tmp_path / 'long.jsonl'}'", "train.max_length=24", "eval.max_examples=null"])
    assert found.remarks[0].startswith(
        "left out: 1 of 3 test rows, of whose responses 24 tokens (train.max_length, or the model's limit) l"
    )
    assert columns(found)[1]["examples"] == 2


def test_a_run_that_was_ended_is_measured_as_it_was_left(run: tuple[Path, list[dict[str, float]]]) -> None:
    folder, rounds = run
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "round-0002.safetensors").unlink()
    found = evaluation(folder)
    assert columns(found)[1] == pytest.approx(rounds[1], abs=1e-6)
    assert found.remarks[0] == "the run did not finish: this is its last checkpoint, after round 1 of 2"


def test_classifiers_are_measured_too(tiny_bert: Path, tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["data=files", f"data.path='{tiny_csv}'", "model=pretrained", f"model.name='{tiny_bert}'", "rank=2", "device=cpu"]
    more = ["federation.num_clients=2", "federation.num_rounds=1", "train.local_steps=2", "plots=false", "init.kind=orthogonal"]
    _, rounds = federated(tmp_path / "run", [*files, *more])
    forget_models()
    base, model, _ = columns(evaluation(tmp_path / "run"))
    assert {k: v for k, v in base.items() if k != "examples"} == pytest.approx(rounds[0], abs=1e-6)
    assert {k: v for k, v in model.items() if k != "examples"} == pytest.approx(rounds[1], abs=1e-6)
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["eval", str(tmp_path / "run"), "--max-examples", "9", "--tasks=loss"])
    out = capsys.readouterr().out
    assert any(line.split()[1:4] == ["examples", "|", "9"] for line in out.splitlines() if line.startswith("| "))
    assert "| macro_f1 " in out
    assert max(map(len, out.splitlines())) <= 100
    with pytest.raises(
        UserError, match=r"^--tasks exact_match: nothing in these data tells a response from its prompt; leave all but loss"
    ):
        evaluation(tmp_path / "run", tasks=["exact_match"])


def test_mistakes_are_one_line(run: tuple[Path, list[dict[str, float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = run
    given = {
        (): "fedsb eval takes the folder of one run or model, and 0 are given",
        (str(folder), str(tmp_path)): "fedsb eval takes the folder of one run or model, and 2 are given",
        (str(tmp_path / "none"),): f"'{tmp_path / 'none'}' is no folder; give the output folder of a run, or that of an exported model",
        (str(tmp_path),): f"'{tmp_path}' holds no run (config.yaml is missing); give the output folder of a run",
        (str(folder), "--max-example", "3"): "unknown flag '--max-example' (did you mean '--max-examples'?)",
        (str(folder), "--tasks"): "--tasks needs a value; see fedsb eval --help",
        (str(folder), "--tasks=bleu"): "unknown task in --tasks 'bleu'; choose from choice, exact_match, loss",
        (str(folder), "--max-examples", "0"): "eval.max_examples=0 is out of range; it must be at least 1",
        (str(folder), "--max-examples", "few"): "eval.max_examples=few is not valid",
        (
            str(folder),
            "method=fedex_lora",
        ): "'method=fedex_lora' is nothing that an evaluation can change of a run; choose from eval.*, data.*, ",
        (str(folder), "eval.score=x"): "unknown key 'eval.score' (did you mean 'eval.scores'?)",
        (str(folder), "--lm-eval", "arc_easy"): "--lm-eval 'arc_easy' is not understood; write tasks=NAME,NAME",
        (str(folder), "--lm-eval", "limit=3"): "--lm-eval 'limit=3' names no tasks; write tasks=NAME,NAME",
        (str(folder), "--lm-eval", "tasks=none.yaml"): "--lm-eval tasks=none.yaml: [Errno 2] No such file or directory",
        (str(folder), "--lm-eval", f"tasks={folder / 'config.yaml'}"): f"--lm-eval tasks={folder / 'config.yaml'}: that file is no task",
        (str(folder), "model.name=/nowhere"): "model.name=/nowhere: no such folder",
    }
    for arguments, said in given.items():
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["eval", *arguments])
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith(f"error: {said}"), (arguments, err)
        assert len(err.splitlines()) == 1


def test_a_model_that_is_gone_is_named_with_what_to_do(run: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    folder, _ = run
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(load_name(config), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"^model.name=.*/gone: no such folder; give a folder with config.json and weights"):
        evaluation(folder)


def load_name(config: Path) -> str:
    return next(line.split("name: ")[1] for line in config.read_text().splitlines() if line.startswith("  name: /"))


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_a_missing_harness_says_how_to_install_it(run: tuple[Path, list[dict[str, float]]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["eval", str(run[0]), "--lm-eval", "tasks=arc_easy;limit=5"])
    assert capsys.readouterr().err == "error: --lm-eval needs the package lm-eval, which is not installed: pip install 'lm-eval[hf]'\n"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_scores_the_merged_model_of_a_run(run: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    """By a task of the user's own: of two answers behind a question the likelier one is the model's."""
    questions = [{"q": f"{a} {b}", "choices": ["goal", "bank"], "gold": i % 2} for i, (a, b) in enumerate(pairwise(FILLERS))]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "two_answers", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(task))
    table = harness(run[0], f"tasks={tmp_path / 'two.yaml'};batch_size=2")
    merged = export(run[0], tmp_path / "merged")[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged).eval(), AutoTokenizer.from_pretrained(merged)

    def likelihood(question: str, answer: str) -> float:
        ids = tokenizer(f"{question} {answer}", return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]])

    right = [likelihood(row["q"], row["choices"][row["gold"]]) > likelihood(row["q"], row["choices"][1 - row["gold"]]) for row in questions]
    assert re.search(rf"two_answers.*\|acc +\|↑ +\| *{sum(right) / len(right):.4f}\|", table), table
