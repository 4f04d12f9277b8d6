"""Which layers a pattern of ``adapter.targets`` selects."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsb.adapters import SPECS, attach, left_out, match_targets, used_by_hand
from fedsb.core.errors import UserError

BERT = {
    f"bert.encoder.layer.{i}.{part}"
    for i in (0, 1)
    for part in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
}
HEAD = ("bert.pooler*", "classifier")
CASES: dict[str, tuple[str | tuple[str, ...], set[str]]] = {
    "all-linear": ("all-linear", BERT),
    "last parts of names": (("query", "value"), {n for n in BERT if n.endswith((".query", ".value"))}),
    "one of them": ("query", {n for n in BERT if n.endswith(".query")}),
    "a dotted suffix": ("output.dense", {n for n in BERT if n.endswith("output.dense")}),
    "a longer suffix": ("attention.output.dense", {n for n in BERT if n.endswith("attention.output.dense")}),
    "a wildcard": ("*.layer.1.*", {n for n in BERT if ".layer.1." in n}),
    "a wildcard in the middle": ("layer.*.attention.self.key", {n for n in BERT if n.endswith(".key")}),
    "alternatives of a letter": ("[qk]*y", {n for n in BERT if n.endswith((".query", ".key"))}),
    "a branch by its whole name": ("bert.encoder.layer.0", {n for n in BERT if ".layer.0." in n}),
    "a whole name": ("bert.encoder.layer.0.output.dense", {"bert.encoder.layer.0.output.dense"}),
    "one twice": (("query", "*.query"), {n for n in BERT if n.endswith(".query")}),
    "what is excluded stays out": (("dense", "query"), {n for n in BERT if n.endswith((".dense", ".query"))}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pattern_selects(case: str, tiny_bert: Path) -> None:
    targets, wanted = CASES[case]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    assert match_targets(model, targets, exclude=HEAD) == sorted(wanted)


def test_conv1d_is_linear_and_an_embedding_is_not(tiny_gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    found = match_targets(model, "all-linear", exclude=("lm_head",))
    assert found == sorted(f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    assert match_targets(model, "c_proj", exclude=("lm_head",)) == [name for name in found if name.endswith("c_proj")]


class Plain(nn.Linear):
    """Computes as its parent, in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Router(nn.Linear):
    """Has a linear layer's weight and another's result."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(-1)


class Mixed(nn.Module):
    """One layer of each kind; ``hand`` is multiplied by hand, and of ``plain`` only the type is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.router, self.hand, self.gate = Plain(6, 6), Router(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.experts = nn.Parameter(torch.zeros(2, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(x.to(self.plain.weight.dtype))
        return self.gate(self.router(x) + x @ self.hand.weight.T)


def test_a_subclass_is_adapted_if_it_computes_as_a_linear_layer() -> None:
    model = Mixed()
    by_hand = used_by_hand(model, ["plain", "hand", "gate"], lambda: model(torch.ones(2, 6)))
    assert by_hand == {"hand"}
    assert match_targets(model, "all-linear", by_hand=by_hand) == ["plain"]
    with pytest.raises(UserError, match="'hand', whose weight the model multiplies by hand"):
        match_targets(model, "hand", by_hand=by_hand)


def test_an_adapted_layer_has_what_its_base_has_and_the_rest_is_said() -> None:
    model = Mixed()
    before = model(torch.ones(2, 6))
    layer = attach(model, SPECS["lora"], targets=["plain"], rank=2, scale=1.0)["plain"]
    assert layer.weight is layer.base.weight
    assert (layer.in_features, layer.bias) == (6, layer.base.bias)
    assert torch.equal(model(torch.ones(2, 6)), before)
    assert copy.deepcopy(layer).in_features == 6
    with pytest.raises(AttributeError):
        _ = layer.nothing_of_the_kind
    assert left_out(model).startswith("experts, router, hand, gate (80.")


def test_a_model_of_routers_says_why_there_is_nothing_to_adapt() -> None:
    with pytest.raises(UserError, match=r"its 1 Router do not compute as nn\.Linear does"):
        match_targets(nn.Sequential(Router(4, 4)), "all-linear")
