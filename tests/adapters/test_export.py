"""Laws of export: whatever format a trained model leaves in, it computes the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import fedsb.adapters.export
from fedsb.adapters import SPECS, attach, layers, match_targets, set_residuals
from fedsb.adapters.export import effective_factors, export_peft
from fedsb.adapters.merging import merged_copy
from fedsb.adapters.residual import Residual
from fedsb.core.errors import UserError
from fedsb.core.state import HEAD, Name, State

# peft 0.21 on transformers 5 still reads the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ENCODER = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3}
TOKENS = torch.arange(14).view(2, 7) + 3


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**ENCODER))


def roberta() -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(**ENCODER, pad_token_id=1))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


# Model, prefixes of its head parameters, PEFT's task.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], str]] = {
    "bert": (bert, ("classifier.", "bert.pooler."), "SEQ_CLS"),
    "roberta": (roberta, ("classifier.out_proj.",), "SEQ_CLS"),
    "gpt2": (gpt2, (), "CAUSAL_LM"),
    "llama": (llama, (), "CAUSAL_LM"),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(case: str, method: str, *, residual: bool, rank: int = 4, hold: str = "matrix") -> tuple[nn.Module, nn.Module, State]:
    """Return a pristine base, a trained adapted copy of it, and the copy's head; a residual is a matrix, or factors held by a rule."""
    make, heads, _ = CASES[case]
    torch.manual_seed(3)
    base = make().eval()
    torch.manual_seed(3)
    model = make().eval()
    targets = match_targets(model, "all-linear", exclude=("bert.pooler*", "classifier.out_proj", "classifier", "lm_head"))
    if case == "roberta":
        targets = sorted({*targets, "classifier.dense"})
    attach(model, SPECS[method], targets=targets, rank=rank, scale=0.7, hold="auto" if hold == "matrix" else hold)
    with torch.no_grad():
        for layer in layers(model).values():
            for role in layer.spec.factors:
                factor = layer.weight_of(role)
                factor.data = torch.empty(factor.shape).normal_(std=0.3)
        for name, parameter in model.named_parameters():
            if name.startswith(heads or ("-",)) and ".B." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if residual and hold == "matrix":
        set_residuals(model, {name: low_rank(layer.shape, 6) for name, layer in layers(model).items()})
    elif residual:
        set_residuals(model, {name: grown(layer.shape, 2, 3) for name, layer in layers(model).items()})
    head = State({Name(n, HEAD): p.detach() for n, p in model.named_parameters() if heads and n.startswith(heads)})
    return base, model, head


def low_rank(shape: tuple[int, int], rank: int) -> Tensor:
    """Draw a small matrix of a rank."""
    m, n = shape
    return 1e-2 * torch.randn(m, rank) @ torch.randn(rank, n)


def grown(shape: tuple[int, int], rank: int, count: int) -> Residual:
    """Draw a small residual of a few pairs, the last of which takes nothing but what is there already."""
    m, n = shape
    residual, pairs = Residual(m, n), [(1e-2 * torch.randn(m, rank), torch.randn(rank, n)) for _ in range(count)]
    for version, pair in enumerate([*pairs, pairs[0]]):
        residual.add(version, *pair)
    return residual


def logits(model: nn.Module) -> Tensor:
    """Run the model on the same few tokens."""
    with torch.no_grad():
        out: Tensor = model(input_ids=TOKENS).logits
    return out


@pytest.mark.parametrize(
    ("method", "residual", "hold"),
    [("lora_sb", False, "auto"), ("lora", True, "matrix"), ("lora", True, "factors"), ("lora", True, "merge"), ("lora", True, "dense")],
)
def test_peft_computes_the_same_logits(case: str, method: str, residual: bool, hold: str, tmp_path: Path) -> None:
    base, model, head = build(case, method, residual=residual, hold=hold)
    expected, before = logits(model), logits(base)
    export_peft(model, tmp_path, base_model="some/base", task_type=CASES[case][2], head=head)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 1e-2, "the adapter must matter for the comparison to mean anything"
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    read = LoraConfig.from_pretrained(str(tmp_path)).to_dict()
    assert {key: sorted(read[key]) if isinstance(read[key], set) else read[key] for key in config} == config
    assert config["base_model_name_or_path"] == "some/base"
    assert config["fan_in_fan_out"] is (case == "gpt2")


@pytest.mark.parametrize(("residual", "hold"), [(False, "auto"), (True, "matrix"), (True, "factors")])
def test_merged_copy_computes_the_same_logits_and_leaves_the_original(case: str, residual: bool, hold: str) -> None:
    _, model, _ = build(case, "lora_sb", residual=residual, hold=hold)
    expected = logits(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert not layers(merged)
    assert merged.state_dict().keys() == CASES[case][0]().state_dict().keys()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.zero_()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_merged_tied_head_leaves_the_embedding() -> None:
    torch.manual_seed(0)
    model = gpt2().eval()
    embedding = model.get_parameter("transformer.wte.weight").detach().clone()
    attach(model, SPECS["lora"], targets=["lm_head"], rank=3, scale=1.0)
    with torch.no_grad():
        for role in ("A", "B"):
            model.get_submodule(f"lm_head.{role}").weight.normal_()  # type: ignore[operator,union-attr]
    merged = merged_copy(model)
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    assert torch.equal(merged.get_parameter("transformer.wte.weight"), embedding)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("residual", "rank", "hold"), [(False, 4, "auto"), (True, 10, "matrix"), (True, 10, "factors"), (True, 10, "merge")]
)
def test_effective_factors_have_the_rank_of_the_change(case: str, residual: bool, rank: int, hold: str) -> None:
    """A generic residual of rank 6 plus a product of rank 4 has rank 10."""
    _, model, _ = build(case, "lora", residual=residual, hold=hold)
    factors = effective_factors(model)
    assert factors.keys() == layers(model).keys()
    for name, layer in layers(model).items():
        u, v = factors[name]
        m, n = layer.shape
        assert (u.shape, v.shape) == ((m, rank), (rank, n))
        change = layer.delta() + (0 if layer.residual is None else layer.residual)
        torch.testing.assert_close((u @ v).double(), change.double(), rtol=0, atol=2e-6)


def test_a_residual_that_cancels_the_product_leaves_rank_one() -> None:
    _, model, _ = build("llama", "lora", residual=False)
    set_residuals(model, {name: -layer.delta() for name, layer in layers(model).items()})
    assert {u.shape[1] for u, _ in effective_factors(model).values()} == {1}


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_matrix_that_a_merge_rounds_away_adds_nothing(size: float) -> None:
    _, model, _ = build("llama", "lora", residual=False, hold="merge")
    before = effective_factors(model)
    set_residuals(model, {name: size * low_rank(layer.shape, 6) for name, layer in layers(model).items()})
    for name, pair in effective_factors(model).items():
        assert all(torch.equal(t, wanted) for t, wanted in zip(pair, before[name], strict=True))


@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_a_large_matrix_is_a_factor_itself(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsb.adapters.export, "LARGEST_SVD", 8)
    _, model, _ = build(case, "lora", residual=True)
    for name, (u, v) in effective_factors(model).items():
        layer = layers(model)[name]
        assert (u.shape[1], layer.residual is None) == (min(layer.shape), False)
        torch.testing.assert_close((u @ v).double(), layer.delta() + layer.residual, rtol=0, atol=2e-6)


def test_differing_ranks_keep_scale_one(tmp_path: Path) -> None:
    base, model, head = build("llama", "lora", residual=False)
    name = "model.layers.1.mlp.down_proj"
    set_residuals(model, {name: low_rank(layers(model)[name].shape, 3)})
    export_peft(model, tmp_path, base_model="b", task_type="CAUSAL_LM", head=head)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {f"^{name}": 7}
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_a_head_parameter_outside_every_module_is_refused(tmp_path: Path) -> None:
    _, model, _ = build("bert", "lora", residual=False)
    model.register_parameter("bias", nn.Parameter(torch.zeros(3)))
    head = State({Name("bias", HEAD): torch.zeros(3)})
    with pytest.raises(UserError, match=r"head parameter 'bias' belongs to no module.*export the merged model"):
        export_peft(model, tmp_path / "adapter", base_model="b", task_type="SEQ_CLS", head=head)
    assert not (tmp_path / "adapter").exists()
