"""Models as they come: whole, or refused in one line; never with weights or words made up on the quiet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsb.adapters import scale_of
from fedsb.config.compose import load
from fedsb.config.schema import ModelConfig
from fedsb.core.errors import UserError
from fedsb.models.loading import load_network, load_tokenizer
from fedsb.tasks.task import TASKS

LABELS = ("film", "sport", "trade")
Edit = Callable[[dict[str, Any]], dict[str, Any]]


def copied(folder: Path, target: Path, edit: Edit = dict) -> ModelConfig:
    """Copy a model folder with its configuration edited, and return how to name it."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(edit(config)), encoding="utf-8")
    return replace(load(["model=pretrained", "model.name=x"]).model, name=str(target))


def test_a_body_of_another_size_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    model = copied(tiny_bert, tmp_path / "wide", lambda config: {**config, "hidden_size": 64})
    with pytest.raises(UserError, match=r"the weights at '.*wide' are not those of its config.json: \d+ tensors"):
        load_network(model, TASKS["classification"], LABELS, 0, "cpu")


def test_a_body_whose_weights_are_another_models_is_refused(tiny_bert: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    model = copied(tiny_bert, tmp_path / "mixed")
    shutil.copyfile(tiny_gpt2 / "model.safetensors", tmp_path / "mixed" / "model.safetensors")
    with pytest.raises(UserError, match=r"are not those of its config\.json"):
        load_network(model, TASKS["classification"], LABELS, 0, "cpu")


def test_an_encoder_is_no_language_model(tiny_bert: Path, tmp_path: Path) -> None:
    model = copied(tiny_bert, tmp_path / "encoder")
    with pytest.raises(UserError, match=r"name a language model whose folder is whole$"):
        load_network(model, TASKS["causal_lm"], LABELS, 0, "cpu")


@pytest.mark.parametrize("load_it", [load_tokenizer, lambda model: load_network(model, TASKS["classification"], LABELS, 0, "cpu")])
def test_a_hub_out_of_reach_is_one_line(load_it: Callable[[ModelConfig], Any], caplog: pytest.LogCaptureFixture) -> None:
    model = replace(load(["model=pretrained", "model.name=x"]).model, name="nobody/no-such-model")
    with pytest.raises(
        UserError, match=r"'nobody/no-such-model': [^\n]*; check model.name, or give a local folder where there is no network$"
    ):
        load_it(model)
    assert not caplog.messages


def test_a_language_model_that_lacks_a_tensor_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = copied(tiny_llama, tmp_path / "torn")
    weights = load_file(tiny_llama / "model.safetensors")
    save_file(
        {k: t for k, t in weights.items() if "layers.1.mlp.up_proj" not in k}, tmp_path / "torn" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UserError, match=r"1 tensors are missing .*layers.1.mlp.up_proj"):
        load_network(model, TASKS["causal_lm"], (), 0, "cpu")


def test_a_head_of_another_size_is_drawn_anew_and_the_body_kept(tiny_bert: Path, tmp_path: Path) -> None:
    model = copied(tiny_bert, tmp_path / "two")
    network = load_network(model, TASKS["classification"], LABELS[:2], 0, "cpu")
    network.save_pretrained(tmp_path / "two")  # type: ignore[operator]
    again = load_network(model, TASKS["classification"], LABELS, 0, "cpu")
    tensors, before = dict(again.named_parameters()), dict(network.named_parameters())
    assert tensors["classifier.weight"].shape[0] == 3
    assert all(torch.equal(tensors[name], before[name]) for name in before if not name.startswith("classifier"))


def test_a_broken_checkpoint_is_one_line(tiny_bert: Path, tmp_path: Path) -> None:
    model = copied(tiny_bert, tmp_path / "junk")
    (tmp_path / "junk" / "model.safetensors").unlink()
    (tmp_path / "junk" / "pytorch_model.bin").write_bytes(b"this is no checkpoint")
    with pytest.raises(UserError, match="cannot load model"):
        load_network(model, TASKS["classification"], LABELS, 0, "cpu")


@pytest.mark.parametrize("wrong", [{"hidden_size": "abc"}, {"hidden_size": 33, "num_attention_heads": 12}, {"model_type": "brt"}])
def test_a_configuration_that_makes_no_model_is_one_line(tiny_bert: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    model = replace(copied(tiny_bert, tmp_path / "odd"), kind="config", config={"model_type": "bert", **wrong})
    with pytest.raises(UserError, match=r"model\.config of .* is not usable"):
        load_network(model, TASKS["classification"], LABELS, 0, "meta")


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_tokeniser_without_words_is_refused(tiny_bert: Path, tmp_path: Path, content: str | None) -> None:
    model = copied(tiny_bert, tmp_path / "mute")
    for path in (tmp_path / "mute").glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (tmp_path / "mute" / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"no tokenizer at '.*mute'.*set model.tokenizer"):
        load_tokenizer(model)


def test_a_tokeniser_keeps_to_the_models_positions(tiny_bert: Path, tmp_path: Path) -> None:
    def limit(name: str, edit: Edit = dict) -> int:
        model = copied(tiny_bert, tmp_path / name, edit)
        path = tmp_path / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "model_max_length": 10**30}), encoding="utf-8")
        tokenizer = load_tokenizer(model)
        assert tokenizer is not None
        return int(tokenizer.model_max_length)

    assert limit("bert") == 48
    # RoBERTa's positions begin behind its padding id.
    assert limit("roberta", lambda config: {**config, "model_type": "roberta", "pad_token_id": 1}) == 46


def test_the_two_scales() -> None:
    assert scale_of(16, 4) == 4.0
    assert scale_of(16, 4, rslora=True) == 8.0
