"""The mean over the real tokens, as a loop over examples computes it that knows no padding and no hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import join
from typing import Any

import pytest
import torch
import yaml
from opacus import GradSampleModule
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    FunnelConfig,
    PreTrainedConfig,
    RobertaConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from fedsb.adapters import layers
from fedsb.app.assembly import model_of
from fedsb.cli import main
from fedsb.client_app import app as client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.cost.table import cost_of
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.models.pooling import pool_by_mean
from fedsb.runtime.local import LocalGrid
from fedsb.server_app import serve
from fedsb.tasks.task import TASKS
from tests.strategies.federations import classification, federate

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

LABELS = ("film", "sport", "trade")
TEXTS = ("goal match", "the old bank said a new price of the market", "cinema", "a scene of the director was new last year")
METHODS = {"fed_sb": "init.kind=orthogonal", "fedavg_lora": "rank=3", "head_only": "seed=0"}
MODELS = ("tiny_bert", "tiny_gpt2", "tiny_llama")
TASK = TASKS["classification"]
Build = Callable[..., AdaptedModel]


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Build:
    """Build a model whose adapters and head do something, the same ones for both poolings."""

    def make(model: str, method: str = "fed_sb", *more: str) -> AdaptedModel:
        overrides = ["model=pretrained", f"model.name='{request.getfixturevalue(model)}'", f"method={method}", METHODS[method], *more]
        config = load(["rank=3", *overrides])
        task = TASKS[config.model.task or "classification"]
        adapted = build_model(config.model, config.adapter, family=config.method.adapter, task=task, labels=LABELS, seed=1)
        stream = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for layer in layers(adapted.model).values():
                for role in layer.spec.factors:
                    factor = layer.weight_of(role)
                    factor.data = torch.empty(factor.shape).normal_(std=0.3, generator=stream)
        return adapted

    return make


def batch_of(adapted: AdaptedModel, *texts: str) -> dict[str, Tensor]:
    assert adapted.tokenizer is not None
    tokens = [adapted.tokenizer(text, return_attention_mask=False) for text in texts]
    return collate([dict(t) for t in tokens], adapted, TASK)


def logits(adapted: AdaptedModel, *texts: str) -> Tensor:
    with torch.no_grad():
        return TASK.forward(adapted.model, batch_of(adapted, *texts))


def by_hand(own: AdaptedModel, *texts: str) -> Tensor:
    """Run the body of a model without pooling over one text after the other, average, and apply the linear head."""
    network: Any = own.model
    head = network.classifier if hasattr(network, "classifier") else network.score
    rows = []
    with torch.no_grad():
        for text in texts:
            hidden = network.base_model(**batch_of(own, text)).last_hidden_state[0]
            mean = torch.stack(list(hidden)).double().sum(0) / len(hidden)
            rows.append(head.weight.double() @ mean + (0 if head.bias is None else head.bias.double()))
    return torch.stack(rows).float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_head_sees_the_mean_over_the_real_tokens(build: Build, model: str, method: str) -> None:
    own, pooled = build(model, method), build(model, method, "model.pooling=mean")
    wanted = by_hand(own, *TEXTS)
    torch.testing.assert_close(logits(pooled, *TEXTS), wanted, rtol=0, atol=1e-5)
    assert float((logits(own, *TEXTS) - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("model", MODELS)
def test_padding_does_not_matter_and_examples_do_not_mix(build: Build, model: str) -> None:
    pooled = build(model, "fed_sb", "model.pooling=mean")
    together = logits(pooled, *TEXTS)
    for row, text in zip(together, TEXTS, strict=True):
        torch.testing.assert_close(logits(pooled, text)[0], row, rtol=0, atol=1e-5)
    others = logits(pooled, TEXTS[0], *(" ".join(reversed(text.split())) for text in TEXTS[1:]))
    assert torch.equal(others[0], together[0])
    assert not torch.allclose(others[1], together[1])


# Heads that look at the first token through layers of their own, or at a pooler of the body's.
SMALL = {"vocab_size": 40, "num_attention_heads": 2, "num_labels": 3, "pad_token_id": 0}
OTHERS: dict[str, tuple[PreTrainedConfig, Callable[[Any, Tensor], Tensor]]] = {
    "roberta": (
        RobertaConfig(**SMALL, hidden_size=16, intermediate_size=16, num_hidden_layers=1),
        lambda net, x: net.classifier.out_proj(torch.tanh(net.classifier.dense(x))),
    ),
    "distilbert": (
        DistilBertConfig(vocab_size=40, n_heads=2, dim=16, hidden_dim=16, n_layers=1, num_labels=3, pad_token_id=0),
        lambda net, x: net.classifier(torch.relu(net.pre_classifier(x))),
    ),
    "albert": (
        AlbertConfig(**SMALL, hidden_size=16, intermediate_size=16, num_hidden_layers=1, embedding_size=8),
        lambda net, x: net.classifier(x),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_heads_see_the_mean_too(name: str) -> None:
    config, head = OTHERS[name]
    torch.manual_seed(0)
    network: Any = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [torch.randint(2, 40, (size,)) for size in (5, 9)]
    with torch.no_grad():
        wanted = torch.cat([head(network, network.base_model(row[None]).last_hidden_state.mean(1)) for row in rows])
        pool_by_mean(network)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        torch.testing.assert_close(network(input_ids=ids, attention_mask=(ids != 0).long()).logits, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(network(rows[0][None]).logits, wanted[:1], rtol=0, atol=1e-5)


def test_the_heads_own_dropout_stays_between_mean_and_classifier() -> None:
    config = BertConfig(
        **SMALL, hidden_size=16, intermediate_size=16, num_hidden_layers=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout=0.5,
    )  # fmt: skip
    network: Any = AutoModelForSequenceClassification.from_config(config).train()
    ids = torch.randint(2, 40, (4, 6))
    mean = network.bert(ids).last_hidden_state.mean(1)
    torch.manual_seed(3)
    wanted = network.classifier(network.dropout(mean))
    pool_by_mean(network)
    torch.manual_seed(3)
    torch.testing.assert_close(network(ids).logits, wanted)


@pytest.mark.parametrize("model", MODELS)
def test_the_mean_is_taken_in_mixed_precision_and_in_inference_mode(build: Build, model: str) -> None:
    pooled = build(model, "fed_sb", "model.pooling=mean")
    plain = logits(pooled, *TEXTS)
    with torch.inference_mode():
        assert torch.equal(TASK.forward(pooled.model, batch_of(pooled, *TEXTS)), plain)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = logits(pooled, *TEXTS)
    torch.testing.assert_close(coarse.float(), plain, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # the first layer's input needs no gradient
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_single_examples_are_their_own(build: Build, model: str) -> None:
    """Opacus's hooks on a padded batch against a backward pass for each example alone."""
    pooled = build(model, "fed_sb", "model.pooling=mean")
    parameters = pooled.trainable()
    targets = torch.tensor([1, 2, 0, 0])
    wanted = []
    for text, target in zip(TEXTS, targets, strict=True):
        loss = nn.functional.cross_entropy(TASK.forward(pooled.model, batch_of(pooled, text)), target[None])
        wanted.append(torch.autograd.grad(loss, list(parameters.values())))
    for module in pooled.model.modules():
        # Opacus looks at modules in training mode alone, and dropout must not differ between the two.
        module.training = any(p.requires_grad for p in module.parameters(recurse=False))
    watched = GradSampleModule(pooled.model, loss_reduction="sum", strict=False)
    nn.functional.cross_entropy(TASK.forward(watched, batch_of(pooled, *TEXTS)), targets, reduction="sum").backward()
    for i, (name, parameter) in enumerate(parameters.items()):
        alone = torch.stack([gradients[i] for gradients in wanted])
        torch.testing.assert_close(parameter.grad_sample, alone, rtol=1e-4, atol=1e-6, msg=str(name))


def test_a_gradient_start_and_rounds_go_through(tiny_bert: Path, tiny_csv: Path) -> None:
    more = ["init.kind=gradient", "init.num_examples=8", "federation.num_rounds=1", "model.pooling=mean"]
    federation = federate(["method=fed_sb", *classification(tiny_bert, tiny_csv), *more])
    assert all(not record.failed for record in federation.records)
    assert federation.records[1].exactness_gap < 1e-5
    own = model_of(load([*classification(tiny_bert, tiny_csv)]), federation.prepared.labels)
    assert own is not federation.prepared.adapted


def test_a_cost_does_not_depend_on_the_pooling(tiny_bert: Path, tiny_csv: Path) -> None:
    own, pooled = (cost_of(load([*classification(tiny_bert, tiny_csv), f"model.pooling={kind}"])) for kind in ("own", "mean"))
    assert own == pooled


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_llama"])
def test_what_is_exported_says_what_it_lacks(
    request: pytest.FixtureRequest, model: str, tiny_csv: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], build: Build
) -> None:
    folder, source = tmp_path / "run", request.getfixturevalue(model)
    overrides = ["method=fedavg_lora", *classification(source, tiny_csv), "federation.num_rounds=1", "model.pooling=mean", "train.lr=0.5"]
    serve(load(overrides), LocalGrid.simulation(client_app, {"overrides": join(overrides)}), folder)
    assert "model.pooling=mean stands in no file of a model" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["pooling"] == "mean"

    with pytest.raises(SystemExit) as done:
        main(["export", str(folder), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert not done.value.code
    assert out.splitlines() == [str(tmp_path / "out")]
    told = "model.pooling=mean stands in no file of a model: call fedsb.models.pool_by_mean(model) on what you load from out"
    assert err.splitlines() == [told]
    assert told in (tmp_path / "out" / "README.md").read_text()
    trained = model_of(load(overrides), LABELS)
    wanted = logits(trained, *TEXTS)
    merged: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert merged.config.fedsb_pooling == "mean"
    base = build(model, "head_only").model
    base.config.pad_token_id = merged.config.pad_token_id
    pool_by_mean(merged)
    pool_by_mean(base)
    for loaded in (merged, PeftModel.from_pretrained(base, str(folder / "adapter")).eval()):
        with torch.no_grad():
            torch.testing.assert_close(loaded(**batch_of(trained, *TEXTS)).logits, wanted, rtol=0, atol=1e-4)


MISTAKES = {
    r"model\.pooling=mean is for tasks with a head, and 'causal_lm' has none; use model\.pooling=own": ["model.task=causal_lm"],
    r"unknown model\.pooling 'average'.*; choose from mean, own": ["model.pooling=average"],
    r"model\.head names 'bert\.pooler\.dense\.bias', which model\.pooling=mean leaves unused; drop it, or use model\.pooling=own": [
        "model.head=[classifier*,bert.pooler*]"
    ],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_pooling_that_does_not_fit_is_one_line(message: str, build: Build) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build("tiny_bert", "fed_sb", "model.pooling=mean", *MISTAKES[message])
    assert "\n" not in str(caught.value)


def test_a_body_that_shortens_the_text_is_refused() -> None:
    config = FunnelConfig(vocab_size=40, block_sizes=[1, 1], num_decoder_layers=1, d_model=16, n_head=2, d_head=8, d_inner=16)
    network = AutoModelForSequenceClassification.from_config(config).eval()
    pool_by_mean(network)
    ids = torch.randint(2, 40, (2, 12))
    with pytest.raises(UserError, match=r"model\.pooling=mean can't read what FunnelBaseModel puts out.*use model\.pooling=own"):
        network(input_ids=ids, attention_mask=torch.ones_like(ids))


class Blind(nn.Module):
    """A body that takes no mask."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)


def test_a_body_without_a_mask_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.pooling=mean needs a body that takes an attention mask, which Blind lacks; use own"):
        pool_by_mean(Blind())


class Overflowing(nn.Module):
    """A body that computes infinity at padding, as some do where nothing is attended to."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        hidden = input_ids.unsqueeze(-1).float().masked_fill(attention_mask.unsqueeze(-1) == 0, float("inf"))
        return BaseModelOutput(last_hidden_state=hidden)


def test_infinity_at_padding_and_a_text_without_tokens_do_no_harm() -> None:
    network = nn.Module()
    network.body = Overflowing()
    network.base_model_prefix = "body"  # type: ignore[assignment]
    pool_by_mean(network)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    found = network.body(torch.tensor([[1, 2, 9], [9, 9, 9]]), mask).last_hidden_state
    assert torch.equal(found[..., 0], torch.tensor([[1.5, 1.5, 1.5], [0.0, 0.0, 0.0]]))
