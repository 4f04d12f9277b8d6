"""An example's output and gradient are its own: what makes them depend on others is caught, and padding tells nobody of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from transformers import BartConfig, BartForSequenceClassification

from clients.company import made_up
from fedsb.config.compose import load
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.privacy.codes import CODES, SelfCheckFailed
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView
from tests.architectures import BART
from tests.clients.private_cases import Case, build_case, clipped_sum, distance, fit, make_case, mechanism, streams, watch
from tests.conftest import encoder_tokenizer, save

SOUND = mechanism(0.5, sigma=1.0, rate=0.4, steps=2, max_batch=4)


def code(case: Case, **options: Any) -> str | None:
    """Return the name of the check that fails, or None."""
    try:
        fit(case, SOUND, check=True, **options)
    except SelfCheckFailed as failed:
        return next(name for name, known in CODES.items() if known is failed.code)
    return None


@pytest.fixture(scope="module")
def built(tiny_bert: Path) -> Case:
    return build_case(tiny_bert, "classification", "lora", "random", dropout=True)


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    """A model that may be broken, and is whole again afterwards. LoRA's B is zero, so that A has no gradient."""
    yield built
    for module in built.adapted.model.modules():
        module._forward_hooks.clear()


def layer_of(case: Case) -> nn.Module:
    return case.adapted.model.get_submodule("bert.encoder.layer.0")


def mean_of_the_batch(module: nn.Module, given: Any, out: Any) -> Any:
    return changed(out, lambda t: t + 0.1 * t.mean(dim=0, keepdim=True))


def in_training_alone(module: nn.Module, given: Any, out: Any) -> Any:
    return mean_of_the_batch(module, given, out) if module.training else out


def in_the_backward_pass_alone(module: nn.Module, given: Any, out: Any) -> Any:
    return changed(out, mixed_back)


def changed(out: Any, how: Callable[[Tensor], Tensor]) -> Any:
    return (how(out[0]), *out[1:]) if isinstance(out, tuple) else how(out)


def mixed_back(t: Tensor) -> Tensor:
    if t.requires_grad:
        t.register_hook(lambda g: g + 0.1 * g.roll(1, 0))
    return t


@pytest.mark.parametrize("fault", [mean_of_the_batch, in_training_alone, in_the_backward_pass_alone])
def test_a_layer_that_mixes_examples_is_caught(case: Case, fault: Callable[..., Any]) -> None:
    layer_of(case).register_forward_hook(fault)
    assert code(case) == "company"


def test_hooks_that_are_wrong_are_named_where_functorch_is_right(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GradSampleHooks.GRAD_SAMPLERS[nn.Linear]

    def doubled(*given: Any) -> dict[nn.Parameter, Tensor]:
        return {p: 2 * t for p, t in right(*given).items()}

    assert code(case) is None
    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, doubled)
    assert code(case) == "hooks"


def test_functorch_is_held_too(case: Case) -> None:
    how = replace(SOUND, functorch=True)
    assert fit(case, how, check=True).steps == how.steps
    layer_of(case).register_forward_hook(in_the_backward_pass_alone)
    with pytest.raises(SelfCheckFailed, match="another example changes"):
        fit(case, how, check=True)


def test_hooks_that_are_wrong_in_a_factor_without_a_gradient_are_caught(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of LoRA's A, which has none as long as B is zero."""
    right = GradSampleHooks.GRAD_SAMPLERS[nn.Linear]

    def swapped(layer: nn.Linear, *given: Any) -> dict[nn.Parameter, Tensor]:
        narrow = layer.out_features == 2
        return {p: t.roll(1, 0) if narrow else t for p, t in right(layer, *given).items()}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, swapped)
    assert code(case) == "hooks"


def configured(fields: dict[str, Any], tiny_bert: Path) -> AdaptedModel:
    config = load(["method=fedavg_lora", "rank=2"])
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {**sizes, "max_position_embeddings": 48, "initializer_range": 0.3, **fields}
    model = replace(config.model, kind="config", name="tiny", path=None, config=shape, tokenizer=str(tiny_bert))
    return build_model(model, config.adapter, family="lora", task=TASKS["classification"], labels=("a", "b", "c"), seed=0)


FAMILIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "projections used twice": (
        {
            "model_type": "deberta-v2",
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 16,
        },
        "company",
    ),
    "convolutions": ({"model_type": "convbert", "embedding_size": 16, "head_ratio": 2, "num_groups": 1}, None),
    "kernels over the sequence": ({"model_type": "yoso", "num_hash": 4, "use_expectation": True}, None),
    "experts": ({"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 2, "pad_token_id": 0}, None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures(family: str, tiny_bert: Path) -> None:
    """Whatever reads across padding has its own gradients as long as the padding is the same for all."""
    fields, wanted = FAMILIES[family]
    case = make_case(tiny_bert, "classification", "lora")
    adapted = configured(fields, tiny_bert)
    one = replace(case, adapted=adapted, state=adapted.initial, frozen=FrozenView(State()))
    assert code(one) == wanted


def reads_padding(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out + 0.5 * out.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("functorch", [False, True])
def test_a_long_text_moves_nobody_else_where_a_layer_reads_padding(tiny_bert: Path, functorch: bool) -> None:
    case = build_case(tiny_bert, "classification", "lora")
    case.adapted.model.bert.embeddings.register_forward_hook(reads_padding)
    short = [{"input_ids": [7, 8, 9], "target": 0}] * 9
    long = {"input_ids": list(range(5, 29)), "target": 2}
    bound = 1e-2
    whole, without = (
        watch(replace(case, features=features), mechanism(bound, functorch=functorch))[0].sum for features in ([*short, long], short)
    )
    assert distance(whole, without) <= bound * (1 + 1e-5)
    alone = watch(replace(case, features=[long]), mechanism(bound, functorch=functorch))[0].sum
    assert distance({name: whole[name] - t for name, t in without.items()}, alone) < 1e-4 * bound


@pytest.mark.parametrize("model", ["tiny_bert", "tiny_gpt2", "tiny_llama"])
def test_made_up_examples_are_of_the_tokenizers_kind(model: str, request: pytest.FixtureRequest) -> None:
    case = make_case(request.getfixturevalue(model), "classification", "lora")
    tokenizer = case.adapted.tokenizer
    assert tokenizer is not None
    for count in (1, 2, 6, 48):
        assert made_up(case.adapted, {"input_ids": [3], "learnt": [0]}, count)["learnt"] == [1] * count  # or it would have no gradient
        made = made_up(case.adapted, {"input_ids": [3], "token_type_ids": [0], "target": 2}, count)
        assert len(made["input_ids"]) == len(made["token_type_ids"]) == count
        assert (made["target"], made["token_type_ids"]) == (0, [0] * count)
        ends = [tokenizer("")["input_ids"].count(t) for t in tokenizer.all_special_ids]
        assert count < 6 or [made["input_ids"].count(t) for t in tokenizer.all_special_ids] == ends


def test_texts_that_come_as_tokens_have_no_frame(tiny_bert: Path) -> None:
    """Whoever hands over tokens may give a tokeniser that does no more than pad."""
    case = build_case(tiny_bert, "classification", "head_only")
    case.adapted.tokenizer = cast(Any, SimpleNamespace(pad_token_id=0, pad_token_type_id=0, eos_token_id=None, model_max_length=48))
    assert made_up(case.adapted, {"input_ids": [5], "target": 1}, 4) == {"input_ids": [1, 2, 3, 4], "target": 0}
    fit(case, SOUND, check=True)


def test_fillers_have_as_many_ends_as_a_pair_of_texts(tmp_path: Path) -> None:
    """Encoder-decoders refuse a batch in which they differ."""
    model = BartForSequenceClassification(BartConfig(**BART, decoder_start_token_id=3, num_labels=3))
    folder = save(model, encoder_tokenizer(), tmp_path / "bart")
    ids = [encoder_tokenizer()("a goal", second)["input_ids"] for second in ("said", "the goal said", "a", "goal", "the", "a the")]
    features = [{"input_ids": tokens, "target": i % 3} for i, tokens in enumerate(ids)]
    case = replace(build_case(folder, "classification", "head_only"), features=features)
    made = {ends: made_up(case.adapted, {"input_ids": [3] * ends}, 6)["input_ids"] for ends in (0, 1, 2, 3, 9)}
    assert {ends: (len(row), row.count(3)) for ends, row in made.items()} == {0: (6, 1), 1: (6, 1), 2: (6, 2), 3: (6, 3), 9: (6, 6)}
    fit(case, mechanism(0.5, sigma=1.0, rate=0.5, steps=4, max_batch=2, constant_time=True), check=True)


@pytest.mark.parametrize("kind", ["flat", "per_layer", "adaptive"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_constant_time_sums_the_same(kind: str, task: str, tiny_bert: Path) -> None:
    """Fillers neither add nor count."""
    case = make_case(tiny_bert, task, "head_only")
    how = mechanism(0.5 * max(case.norms), sigma=1e-9, kind=kind, rate=0.4, steps=3, max_batch=3, count_noise=1e-6)
    plain, constant = watch(case, how), watch(case, replace(how, constant_time=True))
    for one, other in zip(plain, constant, strict=True):
        assert distance(one.sum, other.sum) < 1e-5 * how.clipping.max_norm
        assert one.max_norm == pytest.approx(other.max_norm)
    assert fit(case, replace(how, constant_time=True)).diagnostics == pytest.approx(fit(case, how).diagnostics, rel=1e-4)


def passes(case: Case, how: Any, seed: int) -> list[torch.Size]:
    seen: list[torch.Size] = []
    handle = case.adapted.model.bert.embeddings.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    try:
        fit(case, how, seed=seed)
    finally:
        handle.remove()
    return seen


def test_constant_time_computes_the_same_whatever_is_drawn(tiny_bert: Path) -> None:
    """Also where nothing is, where a text is long, and with the checks on."""
    case = make_case(tiny_bert, "classification", "lora", dropout=True)
    how = mechanism(0.5, sigma=1.0, rate=0.1, steps=4, max_batch=3, constant_time=True)
    short = replace(case, features=[{"input_ids": [7], "target": 0}] * 10)
    found = [passes(one, how, seed) for one in (case, short) for seed in range(3)]
    assert all(shapes == found[0] for shapes in found)
    assert len(set(found[0])) == 1
    assert fit(case, how, check=True).steps == 4


def test_a_sample_beyond_its_room_is_summed_whole(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clients.physical.OVERFLOW", 0.999999)
    case = make_case(tiny_bert, "classification", "head_only")
    max_norm = 2 * max(case.norms)
    seed = next(seed for seed in range(99) if int(torch.rand(10, generator=streams(seed).sampling).lt(0.5).sum()) == 8)
    sample = torch.rand(10, generator=streams(seed).sampling).lt(0.5).nonzero().flatten().tolist()
    (step,) = watch(case, mechanism(max_norm, rate=0.5, max_batch=2, constant_time=True), seed=seed)
    assert distance(step.sum, clipped_sum([case.oracle[i] for i in sample], max_norm)) < 1e-5 * max_norm
