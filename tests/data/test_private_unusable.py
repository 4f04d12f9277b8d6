"""Under example-level privacy a row that cannot be used keeps its place without a loss, whatever the model or the tokenizer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BartConfig, BartForSequenceClassification, PreTrainedTokenizerFast, T5Config, T5ForSequenceClassification

from fedsb.data import Examples, PrivateRows
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.node.own_data import private_features
from fedsb.tasks.task import IGNORED, TASKS
from tests.architectures import BART, T5
from tests.conftest import encoder_tokenizer, save
from tests.data.own_rows import GOOD, LABELS, Configure, features, json_lines, only_its_own, written

ODD = {
    "a label outside the list": {"text": "a goal", "label": "hiv"},
    "no label": {"text": "a goal"},
    "a list for a label": {"text": "a goal", "label": ["film"]},
    "an empty text": {"text": " ", "label": "film"},
    "no text": {"label": "film"},
    "a number for a text": {"text": 7, "label": "film"},
    "another kind of row": [1, 2],
}


@pytest.mark.parametrize("case", ODD)
def test_a_row_that_cannot_be_used_keeps_its_place_and_is_named_in_the_nodes_own_log(
    case: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = json_lines()
    lines[4] = json.dumps(ODD[case])
    found = features(configured(), written(tmp_path / "a.jsonl", lines))
    assert found[4]["target"] == IGNORED
    assert [len(ids) for ids in (found[4]["input_ids"], found[4]["token_type_ids"])] == [2, 2]  # the frame of a text
    assert "1 of 7 rows cannot be used and take part without a loss (row 5: " in caplog.text
    assert "hiv" not in caplog.text


@pytest.mark.parametrize("columns", ["text", "[text,more]"])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_row_that_cannot_be_used_does_not_stop_a_model_that_looks_for_the_end_of_a_text(
    kind: str, columns: str, configured: Configure, tmp_path: Path
) -> None:
    model = {
        "bart": lambda: BartForSequenceClassification(BartConfig(**BART, decoder_start_token_id=3, num_labels=3)),
        "t5": lambda: T5ForSequenceClassification(T5Config(**T5, pad_token_id=0, decoder_start_token_id=0, num_labels=3)),
    }[kind]()
    folder = save(model, encoder_tokenizer(), tmp_path / kind)
    config = configured(f"model.name='{folder}'", f"data.text={columns}")
    lines = [json.dumps({"text": text, "more": "a goal", "label": label}) for text, label in GOOD]
    lines[4] = json.dumps({"text": "a goal", "more": "a goal", "label": "hiv"})
    found, task = features(config, written(tmp_path / "a.jsonl", lines)), TASKS["classification"]
    adapted = build_model(config.model, config.adapter, family="lora", task=task, labels=LABELS, seed=0)
    batch = collate(found, adapted, task, 12)
    losses = task.losses(task.forward(adapted.model, batch), batch)
    assert [place for place, loss in enumerate(losses.tolist()) if loss == 0] == [4]


@pytest.mark.parametrize("text", ["a goal", "zebra"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_row_that_the_tokenizer_does_not_take_moves_no_other(
    task: str, text: str, configured: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an unknown token a word that it does not know makes it raise, for all texts that it is given."""
    known = Tokenizer(WordLevel({word: i for i, word in enumerate(["</s>", *(f"w{i}" for i in range(30)), "a", "goal"])}))
    known.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known, eos_token="</s>", pad_token="</s>", unk_token=None).save_pretrained(tmp_path / "own")
    lines = [json.dumps({"text": f"w{i} w{i + 1}", "label": LABELS[i % 3]}) for i in range(7)]
    line = json.dumps({"text": text, "label": "film"})
    more = ("data.label=null", "data.labels=null") if task == "causal_lm" else ()
    config = configured(f"model.tokenizer='{tmp_path / 'own'}'", f"data.task={task}", *more)
    only_its_own(config, tmp_path / "a.jsonl", lines, 3, line)
    row = features(config, tmp_path / "a.jsonl")[3]
    assert (text == "zebra") == (len(row["input_ids"]) == 1) == ("row 4: the tokenizer does not take it" in caplog.text)
    assert row.get("target", IGNORED) == (IGNORED if text == "zebra" or task == "causal_lm" else 0)


def test_an_example_without_a_target_has_no_loss_and_no_gradient() -> None:
    """The sum over examples is what it is without it, for every task."""
    ids, generator = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.Generator().manual_seed(0)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    shapes = {"classification": (2, 4), "regression": (2, 1), "causal_lm": (2, 3, 9)}
    for name, task in TASKS.items():
        outputs = torch.randn(shapes[name], generator=generator, requires_grad=True)
        losses = task.losses(outputs, {**batch, "targets": task.target_tensor([1, task.no_target])})
        losses.sum().backward()
        losses = losses.detach()
        assert outputs.grad is not None
        assert float(losses[0]) > 0
        assert float(losses[1]) == 0
        assert bool(outputs.grad[0].any())
        assert not outputs.grad[1].any()


def test_a_row_that_the_tokenizer_refuses_does_not_have_the_others_read_one_by_one(tmp_path: Path) -> None:
    """Refused rows are found by halves, and named."""
    rows = PrivateRows(Examples(tuple(f"goal {i}" for i in range(64))), {})
    calls: list[int] = []

    def tokenised(examples: Examples) -> list[dict[str, Any]]:
        calls.append(len(examples))
        if any(text in ("goal 7", "goal 40") for text in examples.texts):
            raise TypeError("no")
        return [{"input_ids": [int(text.split()[1]) if text else 99]} for text in examples.texts]

    found = private_features(rows, 8, tokenised, no_target=math.nan)
    assert [row["input_ids"] for row in found] == [[99 if i in (7, 40) else i] for i in range(64)]
    assert len(calls) <= 2 * 2 * 7
