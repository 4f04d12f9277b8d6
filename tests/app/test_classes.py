"""The classes of a run are those that it was trained on, whatever its data hold by now."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedsb.app.assembly import _MEMO
from fedsb.app.exports.on_request import export
from fedsb.app.measuring.evaluating import evaluation
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from tests.app.runs import federated
from tests.conftest import FILLERS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
WORDS = {"film": "goal", "sport": "bank", "trade": "team"}
QUICK = [
    "device=cpu", "rank=4", "plots=false", "method=fedex_lora", "federation.num_clients=2", "federation.num_rounds=2",
    "federation.partition.kind=iid", "train.lr=0.02", "train.local_epochs=3", "train.batch_size=8", "train.max_length=12",
]  # fmt: skip


def written(path: Path, called: dict[str, str], without: str = "") -> Path:
    rows = [
        (f"{WORDS[name]} {a} {b}", called.get(name, name)) for name in WORDS for a in FILLERS[:5] for b in FILLERS[:4] if name != without
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    _MEMO.clear()
    return path


@pytest.fixture(scope="module", params=["tiny_bert", "tiny_llama"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    folder = tmp_path_factory.mktemp("classes")
    table = written(folder / "t.csv", {})
    model = [f"model.name='{request.getfixturevalue(request.param)}'", "model=pretrained"]
    overrides = [*QUICK, *model, "data=files", f"data.path='{table}'"]
    federated(folder / "run", overrides)
    return folder / "run", table, overrides


def columns(folder: Path, *changes: str) -> list[dict[str, float]]:
    found = evaluation(folder, changes)
    return [{row.metric: getattr(row, side).value for row in found.rows if getattr(row, side)} for side in ("base", "model")]


def answered(model: nn.Module, tokenizer: Any) -> Tensor:
    batch = tokenizer([f"{word} {FILLERS[0]}" for word in WORDS.values()], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**{key: value for key, value in batch.items() if key != "token_type_ids"}).logits


def test_an_export_has_the_run_s_classes_where_the_data_have_others_or_are_gone(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    folder, table, _ = run
    wanted = export(folder, tmp_path / "before")[0]
    written(table, {"film": "zfilm"})
    renamed = export(folder, tmp_path / "renamed")[0]
    table.unlink()
    gone = export(folder, tmp_path / "gone")[0]
    written(table, {})
    names, models = [], []
    for out in (wanted, renamed, gone):
        models.append(AutoModelForSequenceClassification.from_pretrained(out))
        names.append([models[-1].config.id2label[i] for i in range(3)])
    assert names == [["film", "sport", "trade"]] * 3
    tokenizer = AutoTokenizer.from_pretrained(wanted)
    first, *others = [answered(model, tokenizer) for model in models]
    assert all(torch.equal(first, other) for other in others)


def test_other_classes_are_told_and_not_measured_nor_gone_on_with(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    folder, table, overrides = run
    other = written(tmp_path / "other.csv", {"film": "zfilm"})
    with pytest.raises(UserError, match="zfilm"):
        evaluation(folder, [f"data.path='{other}'"])
    for called, without in (({"film": "zfilm"}, ""), ({}, "trade")):
        written(table, called, without)
        with pytest.raises(UserError, match="the classes of this run are film, sport, trade, and the data have"):
            federated(folder, [*overrides, f"resume='{folder}'"])
    written(table, {})


def test_an_exported_classifier_has_its_base_beside_it_in_its_run_s_folder(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    folder, table, _ = run
    rounds = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    inside, _ = export(folder)
    base, model = columns(inside)
    for found, wanted in ((base, rounds[0]), (model, rounds[-1])):
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    other = written(tmp_path / "other.csv", {"film": "zfilm"})
    away = [*(text for text in QUICK if text.startswith("train.max")), "data=files", f"data.path='{other}'"]
    with pytest.raises(UserError, match=r"holds no .* for the task 'classification'"):
        evaluation(export(folder, tmp_path / "away")[0], away)
    assert table.is_file()


def test_the_card_s_own_lines_load_the_adapter_to_what_the_merged_model_says(
    run: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, _ = run
    monkeypatch.chdir(tmp_path)
    merged = export(folder, Path("it's merged"))[0]
    adapter = export(folder, Path('an "adapter"'), form="peft")[0]
    found = []
    for out in (merged, adapter):
        code = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[0]
        base = yaml.safe_load((folder / "config.yaml").read_text())["model"]["name"]
        names: dict[str, Any] = {}
        exec(code.replace("'BASE'", repr(base)), names)
        found.append(answered(names["model"], names["tokenizer"]))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert "The base is what the run had in a folder called" in (adapter / "README.md").read_text()


def test_what_does_not_fit_float16_is_refused_and_leaves_nothing(tmp_path: Path, tiny_bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model.get_input_embeddings().weight.data[7, 3] = 2e5
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "large")
    table = written(tmp_path / "t.csv", {})
    quick = ["federation.num_rounds=1", "model=pretrained", f"model.name='{tmp_path / 'large'}'", "data=files", f"data.path='{table}'"]
    federated(tmp_path / "run", [*QUICK, *quick])
    with pytest.raises(UserError, match=r"1 values of '.*word_embeddings.weight' do not fit --dtype float16; use bfloat16 or float32"):
        export(tmp_path / "run", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_random_weights_have_no_adapter_to_be_put_on() -> None:
    from fedsb.app.exports.formats import FORMATS

    with pytest.raises(UserError, match="random weights that lie nowhere"):
        FORMATS["peft"].check(load(["model.kind=config", "model.name=acme/own"]), None)
