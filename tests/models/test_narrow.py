"""A base in bfloat16: what trains stays float32, computes beside it, and says on the wire what it says beside a float32 base."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsb.adapters import SPECS, layers
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.core.rng import numpy_generator, torch_generator
from fedsb.core.state import State
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.models.fit import OPTIMIZERS, Site, fit
from fedsb.models.packing import check_packing
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView

SITE = Site(seed=3, client="client-1", round=1, num_rounds=2)
CASES = [("tiny_llama", "causal_lm"), ("tiny_gpt2", "causal_lm"), ("tiny_bert", "classification"), ("tiny_llama", "classification")]


def built(folder: Path, task: str, family: str = "lora", *more: str, dtype: str = "bfloat16", seed: int = 0) -> AdaptedModel:
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", f"model.dtype={dtype}", *more])
    adapted = build_model(config.model, config.adapter, family=family, task=TASKS[task], labels=("a", "b", "c"), seed=seed)
    brought = {n: torch.zeros(shape) for n, shape in adapted.layouts.down.shapes}
    state = State(brought).merge(adapted.initial).items()
    start = State({n: t + 0.1 * torch.randn(t.shape, generator=torch_generator(0, "test", *n)) for n, t in state})
    shapes = (*adapted.layouts.log.shapes, *adapted.layouts.made.shapes)
    frozen = {n: torch.randn(s, generator=torch_generator(0, "test", *n)) / s[-1] ** 0.5 for n, s in shapes}
    adapted.install(start, FrozenView(State(frozen)))
    return adapted


def texts(count: int = 9) -> list[dict[str, Any]]:
    draw = numpy_generator(0, "texts")
    return [{"input_ids": draw.integers(5, 25, 3 + i).tolist(), "target": i % 3} for i in range(count)]


def gradients(adapted: AdaptedModel, task: str) -> dict[Any, Tensor]:
    batch = collate(texts(), adapted, TASKS[task])
    adapted.model.zero_grad()
    TASKS[task].loss(TASKS[task].forward(adapted.model, batch), batch).backward()
    return {name: p.grad for name, p in adapted.trainable().items() if p.grad is not None}


def flat(tensors: dict[Any, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("family", ["lora", "lora_sb"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_factors_and_head_are_float32_and_their_gradients_those_of_a_float32_base(
    case: tuple[str, str], family: str, request: pytest.FixtureRequest
) -> None:
    """But for the rounding of bfloat16, of which 2**-8 is one step; what is frozen has the base's dtype."""
    folder, task = request.getfixturevalue(case[0]), case[1]
    narrow, wide = built(folder, task, family), built(folder, task, family, dtype="float32")
    trained = narrow.trainable()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {layer.base.weight.dtype for layer in narrow.layers.values()} == {torch.bfloat16}
    found, wanted = gradients(narrow, task), gradients(wide, task)
    assert {g.dtype for g in found.values()} == {torch.float32}
    assert found.keys() == wanted.keys() == trained.keys()
    a, b = flat(found), flat(wanted)
    assert float((a - b).norm() / b.norm()) < 0.05


@pytest.mark.parametrize("family", sorted(SPECS))
def test_every_family_trains_beside_a_narrow_base_and_leaves_it_as_it_is(tiny_llama: Path, family: str) -> None:
    task = "classification" if not SPECS[family].factors else "causal_lm"
    adapted = built(tiny_llama, task, family)
    frozen = {n: p.detach().clone() for n, p in adapted.model.named_parameters() if not p.requires_grad}
    before = adapted.trained()
    train = replace(load().train, local_steps=3, batch_size=4, lr=0.01)
    assert fit(adapted, TASKS[task], texts(), train=train, site=SITE).loss > 0
    assert any(not torch.equal(t, before[n]) for n, t in adapted.trained().items())
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.model.named_parameters() if n in frozen)


def test_the_layer_is_its_base_and_the_factors_product_in_bfloat16(tiny_llama: Path) -> None:
    adapted = built(tiny_llama, "causal_lm")
    name, layer = next(iter(layers(adapted.model).items()))
    x = torch.randn(5, layer.shape[1]).bfloat16()
    with torch.no_grad():
        exact, out = copy.deepcopy(layer).double()(x.double()), layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), exact, rtol=2**-6, atol=2**-6 * float(exact.abs().max())), name


def test_moments_of_the_optimiser_are_float32(tiny_llama: Path) -> None:
    adapted = built(tiny_llama, "causal_lm")
    gradients(adapted, "causal_lm")
    optimizer = OPTIMIZERS["adamw"](list(adapted.trainable().values()), load().train)
    optimizer.step()
    assert {m.dtype for s in optimizer.state.values() for m in s.values() if isinstance(m, Tensor)} == {torch.float32}


def test_the_layouts_on_the_wire_are_those_of_a_float32_base(tiny_bert: Path) -> None:
    narrow, wide = (built(tiny_bert, "classification", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert narrow.layouts.down == wide.layouts.down
    assert narrow.layouts.up == wide.layouts.up
    assert {t.dtype for t in narrow.trained().values()} == {torch.float32}


@pytest.mark.parametrize("head", ["lm_head.weight", "[model.norm.weight]", "[model.embed_tokens.weight]", "['*layernorm.weight']"])
def test_a_head_anywhere_in_the_network_learns_in_float32(tiny_llama: Path, head: str) -> None:
    """At its end, before it, and in its middle, where frozen layers come after it."""
    adapted = built(tiny_llama, "causal_lm", "lora", f"model.head={head}")
    found = gradients(adapted, "causal_lm")
    assert all(bool(found[name].any()) for name in adapted.trainable())
    assert {g.dtype for g in found.values()} == {torch.float32}


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this processor multiplies in float16")
def test_float16_on_a_processor_without_it_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UserError, match=r"model\.dtype=float16.*bfloat16"):
        built(tiny_llama, "causal_lm", dtype="float16")


def test_packed_rows_are_taken_beside_a_narrow_base(tiny_llama: Path) -> None:
    """Its rounding does not pass for examples that see each other."""
    adapted = built(tiny_llama, "causal_lm")
    check_packing(adapted, TASKS["causal_lm"])
    train = replace(load().train, local_steps=2, batch_size=4, packing=True, accumulation=2, max_length=24)
    assert fit(adapted, TASKS["causal_lm"], texts(), train=train, site=SITE).loss > 0
