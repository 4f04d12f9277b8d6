"""Federations over instruction data: the loss is that of the responses, rows without one stand aside, and privacy counts conversations."""

from __future__ import annotations

import json
from pathlib import Path
from shlex import join

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsb import client_stack
from fedsb.app.assembly import corpus_of
from fedsb.app.client_data import client_features
from fedsb.app.opening import cut_texts, dropped_rows, template_remark
from fedsb.config.compose import load
from fedsb.core.state import squared_norm, subtract
from fedsb.run.checkpoint import load_checkpoint
from fedsb.runtime.grids import grid_for
from fedsb.server_app import serve
from tests.conftest import TOPICS
from tests.data.chats import CHATML
from tests.strategies.federations import Federation, federate, language_model, start_of
from tests.strategies.private_runs import EXAMPLE, metrics_of, run_privately, small

METHODS = ("fed_sb", "fedex_lora")
PAIR = ("data.task=causal_lm", "data.label=null", "data.prompt=prompt", "data.response=response")
TOO_LONG = 60  # words


def write(path: Path, rows: int, *, long: int = 0) -> Path:
    """Write prompts and responses; the first ``long`` prompts fill a model of 48 positions."""
    topics = sorted(TOPICS)
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            words = TOPICS[topics[i % 3]]
            prompt = " ".join([words[i % 6], *["the"] * (TOO_LONG if i < long else i % 4)])
            file.write(json.dumps({"prompt": prompt, "response": " ".join(words[: 1 + i % 5])}) + "\n")
    return path


def run(model: Path, folder: Path, *more: str, long: int = 0) -> Federation:
    train, test = write(folder / "train.jsonl", 30, long=long), write(folder / "test.jsonl", 9)
    sizes = ("federation.num_rounds=2", f"data.test_path='{test}'", "train.max_length=512")
    return federate([*language_model(model, train), *PAIR, *sizes, *more])


def slow_loss(model: Path, table: Path, *, whole: bool = False) -> float:
    """Return the loss of the untouched model, read and computed by transformers alone, word by word of each response and its end."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    nll = []
    for line in table.read_text().splitlines():
        row = json.loads(line)
        before = tokenizer(f"User: {row['prompt']}\nAssistant:")["input_ids"]
        ids = [*before, *tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            scores = torch.log_softmax(network(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        nll += [-float(scores[place - 1, ids[place]]) for place in range(1 if whole else len(before), len(ids))]
    return sum(nll) / len(nll)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_measured_by_its_responses_and_learns_them(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    found = run(tiny_llama, tmp_path, f"method={method}", start_of(method), "train.lr=0.02", "train.local_steps=8")
    losses = [record.metrics["loss"] for record in found.records]
    assert losses[0] == pytest.approx(slow_loss(tiny_llama, tmp_path / "test.jsonl"), rel=1e-5)
    assert losses[-1] < losses[0]
    assert not dropped_rows(found.config)
    assert "no chat template" in template_remark(found.config)


def test_all_of_a_conversation_is_learnt_where_that_is_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    found = run(tiny_llama, tmp_path, start_of("fed_sb"), "data.loss_on=all", "federation.num_rounds=1")
    assert found.records[0].metrics["loss"] == pytest.approx(slow_loss(tiny_llama, tmp_path / "test.jsonl", whole=True), rel=1e-5)


def test_rows_whose_prompts_fill_the_model_are_left_out_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    found = run(tiny_llama, tmp_path, start_of("fed_sb"), "federation.num_rounds=1", long=7)
    assert corpus_of(found.config).dropped == {"train": 7}
    said = "left out: 7 of 30 train rows, of whose responses 48 tokens (train.max_length, or the model's limit) leave nothing"
    assert dropped_rows(found.config) == said
    counted = sum(exchange.answer.num_examples for exchange in found.grid.rounds()[1])
    assert counted == sum(len(client_features(found.config, f"client-{i}", None, ())[0]) for i in range(5)) == 23


def test_the_share_of_cut_responses_is_said(tiny_llama: Path, tmp_path: Path) -> None:
    """Against words counted by hand: those of the row, the four of the template, and the end."""
    table = write(tmp_path / "train.jsonl", 30)
    config = load([*language_model(tiny_llama, table), *PAIR, f"data.test_path='{table}'", "train.max_length=9"])
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    tokens = [len(f"User : {row['prompt']} Assistant : {row['response']} end".split()) for row in rows]
    assert not corpus_of(config).dropped
    share = sum(count > 9 for count in tokens) / len(rows)
    assert cut_texts(config) == (
        f"{share:.0%} of the training texts are longer than train.max_length=9 tokens: the ends of their responses are cut off"
    )


def test_the_template_of_a_tokenizer_is_taken(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = run(tiny_llama, tmp_path, start_of("fed_sb"), f"model.tokenizer='{tmp_path / 'tokenizer'}'", "federation.num_rounds=1")
    assert not template_remark(found.config)
    assert all(feature["input_ids"][-1] == tokenizer.eos_token_id for feature in client_features(found.config, "client-0", None, ())[0])


def test_a_template_of_one_column_with_all_learnt_is_a_run_on_texts_to_the_bit(tiny_gpt2: Path, tiny_csv: Path) -> None:
    one = [*language_model(tiny_gpt2, tiny_csv), start_of("fed_sb"), "federation.num_rounds=2"]
    texts, template = federate(one), federate([*one, "data.template='{text}'", "data.loss_on=all"])
    assert texts.sha256 == template.sha256
    assert [record.metrics for record in texts.records] == [record.metrics for record in template.records]


def test_under_privacy_each_row_keeps_its_place(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Rows without a response take part without a loss, and conversations are what is counted, charged and clipped."""
    train, test = write(tmp_path / "train.jsonl", 80, long=9), write(tmp_path / "test.jsonl", 12)
    whole = small(tiny_gpt2, tmp_path, *PAIR, *EXAMPLE, start_of("fed_sb"))
    base = [word for word in whole if not word.startswith(("data.path", "data.test"))]
    found = run_privately([*base, f"data.path='{train}'", f"data.test_path='{test}'", "train.max_length=48"], tmp_path / "run")
    assert found.error is None
    features = [row for i in range(4) for row in client_features(found.config, f"client-{i}", None, ())[0]]
    assert len(features) == 80
    assert sum(not any(row["learnt"]) for row in features) == 9
    assert {metrics_of(exchange.reply)["num-examples"] for exchange in found.grid.rounds()[1]} == {20}
    assert all(exchange.uploaded for exchange in found.grid.rounds()[2])


@pytest.mark.parametrize("privacy", [(), (*EXAMPLE, "privacy.constant_time=true")], ids=["plain", "private"])
def test_clients_side_by_side_learn_what_each_learns_alone(
    privacy: tuple[str, ...], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    together = client_stack.answer_together
    monkeypatch.setattr(client_stack, "answer_together", lambda m, c: sizes.append(len(m)) or together(m, c))  # type: ignore[func-returns-value]
    train, test = write(tmp_path / "train.jsonl", 80), write(tmp_path / "test.jsonl", 12)
    whole = small(tiny_llama, tmp_path, *PAIR, *privacy, start_of("fed_sb"), "train.max_length=24", "federation.num_rounds=1")
    base = [word for word in whole if not word.startswith(("data.path", "data.test"))]
    states, losses = [], []
    for stack in (1, 4):
        overrides = [*base, f"data.path='{train}'", f"data.test_path='{test}'", f"runtime.stack={stack}"]
        folder = tmp_path / f"stack-{stack}"
        config = load(overrides)
        losses.append(serve(config, grid_for(config, {"overrides": join(overrides), "output": str(folder)}), folder)["metrics"]["loss"])
        states.append(load_checkpoint(folder / "checkpoints").state)
    assert sizes == [4]
    assert (squared_norm(subtract(*states)) / squared_norm(states[0])) ** 0.5 < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
