"""What a machine or a model cannot do is said before a run begins."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn
from torch._inductor import config as inductor

from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.models.abilities import check_abilities
from fedsb.models.adapted import AdaptedModel
from fedsb.runtime.stack_size import stack_size
from tests.models.test_narrow import built

TRAIN = load().train


@pytest.fixture
def bare(tiny_llama: Path) -> AdaptedModel:
    return built(tiny_llama, "causal_lm")


def test_what_can_be_done_passes(bare: AdaptedModel) -> None:
    check_abilities(replace(TRAIN, gradient_checkpointing=True), bare)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_eight_bit_moments_need_a_package(bare: AdaptedModel) -> None:
    with pytest.raises(UserError, match=r"adamw8bit needs bitsandbytes, which is not installed: .* or use train\.optimizer=adamw$"):
        check_abilities(replace(TRAIN, optimizer="adamw8bit"), bare)


def test_a_model_that_cannot_recompute_is_refused(bare: AdaptedModel) -> None:
    plain = nn.Linear(2, 2)
    plain.config = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"^train\.gradient_checkpointing=true is not for Linear"):
        check_abilities(replace(TRAIN, gradient_checkpointing=True), replace(bare, model=plain))


def test_compiling_without_a_compiler_is_refused(bare: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    # Pytest's own patch of a setting of torch's leaves it hidden behind it.
    with (
        inductor.patch("cpp.cxx", ("/no/such/compiler",)),
        pytest.raises(UserError, match=r"^train\.compile=true finds no compiler for cpu"),
    ):
        check_abilities(replace(TRAIN, compile=True), bare)


def test_an_attention_without_gradients_is_refused(tiny_llama: Path) -> None:
    adapted = built(tiny_llama, "causal_lm", "lora", "model.attn_implementation=flex_attention")
    with pytest.raises(UserError, match=r"^model\.attn_implementation=flex_attention has no gradients on a CPU; [^\n]*$"):
        check_abilities(TRAIN, adapted)


def test_an_attention_that_is_not_there_is_one_line(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"cannot load model '[^\n]*attn_implementation[^\n]*$"):
        built(tiny_llama, "causal_lm", "lora", "model.attn_implementation=slow")


def test_the_attention_that_is_named_is_taken(tiny_llama: Path) -> None:
    for kind in ("eager", "sdpa"):
        assert built(tiny_llama, "causal_lm", "lora", f"model.attn_implementation={kind}").model.config._attn_implementation == kind


@pytest.mark.parametrize(
    "key",
    ["train.accumulation=2", "train.gradient_checkpointing=true", "train.compile=true", "model.dtype=float16", "model.device_map=auto"],
)
def test_auto_puts_no_clients_side_by_side_where_each_has_passes_of_its_own(key: str) -> None:
    small = ("train.batch_size=1", "train.max_length=16")
    assert (stack_size(load([*small, "runtime.stack=auto"])), stack_size(load([*small, "runtime.stack=auto", key]))) == (8, 1)
