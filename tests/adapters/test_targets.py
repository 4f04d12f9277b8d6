"""Which layers a pattern of ``adapter.targets`` selects."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedsb.adapters import match_targets

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
