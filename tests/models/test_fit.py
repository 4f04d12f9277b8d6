"""Local training: schedules, counts, the proximal term, and that a fit depends on its site alone."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsb.config.compose import load
from fedsb.config.schema import TrainConfig
from fedsb.core.rng import numpy_generator, torch_generator
from fedsb.core.state import State, sha256
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import autocast, collate
from fedsb.models.fit import OPTIMIZERS, SCHEDULES, Site, fit, plan_batches, rate_factor
from fedsb.tasks.task import TASKS
from fedsb.wire.frozen import FrozenView

law = settings(max_examples=25, deadline=None)
TASK = TASKS["classification"]
SITE = Site(seed=3, client="client-1", round=2, num_rounds=4)
schedules = st.sampled_from(sorted(SCHEDULES))
warmups = st.floats(0, 1)


@pytest.fixture(scope="module")
def train() -> TrainConfig:
    return load(["train.batch_size=4", "train.bucket=2", "train.lr=0.01"]).train


@pytest.fixture(scope="module")
def adapted(tiny_bert: Path) -> AdaptedModel:
    config = load(["model=pretrained", f"model.name='{tiny_bert}'", "rank=2", "adapter.dropout=0.2"])
    return build_model(config.model, config.adapter, family="lora", task=TASK, labels=("a", "b", "c"), seed=0)


@pytest.fixture(scope="module")
def start(adapted: AdaptedModel) -> State:
    """Factors that are nowhere zero, and the head."""
    drawn = adapted.trained()
    return State({name: t + 0.1 * torch.randn(t.shape, generator=torch_generator(0, "test", *name)) for name, t in drawn.items()})


@pytest.fixture(scope="module")
def features() -> list[dict[str, Any]]:
    draw = numpy_generator(0, "test")
    return [{"input_ids": [2, *draw.integers(4, 30, n).tolist(), 3], "target": n % 3} for n in (2, 9, 5, 3, 12, 7, 4, 4, 6, 8, 11)]


@pytest.fixture(scope="module")
def base_train() -> TrainConfig:
    return load().train


@law
@given(schedules, warmups, st.integers(1, 12), st.integers(1, 6))
def test_a_schedule_over_the_run_is_one_schedule(base_train: TrainConfig, schedule: str, warmup: float, steps: int, rounds: int) -> None:
    """Round after round it goes on where it stood, as one long round would."""
    over_run = replace(base_train, schedule=schedule, warmup=warmup, schedule_over="run")
    whole = [rate_factor(over_run, step=i, steps=steps * rounds, round_number=1, num_rounds=1) for i in range(steps * rounds)]
    parts = [rate_factor(over_run, step=i, steps=steps, round_number=t + 1, num_rounds=rounds) for t in range(rounds) for i in range(steps)]
    assert parts == whole
    warm = round(warmup * steps * rounds)
    assert all(0 <= factor <= 1 for factor in whole)
    assert whole[:warm] == sorted(whole[:warm])
    assert whole[warm:] == sorted(whole[warm:], reverse=True)
    assert max(whole) == 1.0


@law
@given(schedules, warmups, st.integers(1, 12), st.integers(1, 6), st.integers(1, 6))
def test_a_schedule_over_a_round_is_the_same_in_each(
    base_train: TrainConfig, schedule: str, warmup: float, steps: int, rounds: int, number: int
) -> None:
    over_round = replace(base_train, schedule=schedule, warmup=warmup, schedule_over="round")
    later = [rate_factor(over_round, step=i, steps=steps, round_number=number, num_rounds=rounds) for i in range(steps)]
    assert later == [rate_factor(over_round, step=i, steps=steps, round_number=1, num_rounds=1) for i in range(steps)]


def test_schedules_by_hand(base_train: TrainConfig) -> None:
    """Ten steps, two of them warm-up: 1/2 and 1, then eight down from 1; halfway, after four, both are at 1/2."""
    for schedule in ("linear", "cosine"):
        config = replace(base_train, schedule=schedule, warmup=0.2, schedule_over="round")
        factors = [rate_factor(config, step=i, steps=10, round_number=1, num_rounds=1) for i in range(10)]
        assert factors[:3] == [0.5, 1.0, 1.0]
        assert factors[6] == pytest.approx(0.5)


@law
@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 9))
def test_epochs_and_steps_are_counted(base_train: TrainConfig, examples: int, epochs: int, steps: int) -> None:
    lengths = list(range(1, examples + 1))
    by_epochs = replace(base_train, batch_size=4, bucket=2, local_epochs=epochs)
    batches = plan_batches(lengths, by_epochs, SITE)
    assert sorted(i for batch in batches for i in batch) == sorted(list(range(examples)) * epochs)
    assert len(batches) == epochs * -(-examples // 4)
    by_steps = plan_batches(lengths, replace(by_epochs, local_steps=steps), SITE)
    assert len(by_steps) == steps
    assert plan_batches(lengths, by_epochs, SITE) == batches


def run(adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig, site: Site = SITE) -> str:
    adapted.install(start, FrozenView())
    fit(adapted, TASK, features, train=train, site=site)
    return sha256(adapted.trained())


def test_a_fit_depends_on_its_site_and_nothing_else(
    adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig
) -> None:
    """Batches and dropout come from streams of (seed, client, round)."""
    first = run(adapted, start, features, train)
    run(adapted, start, features[:5], train, Site(9, "client-7", 1, 4))
    torch.manual_seed(1)
    assert run(adapted, start, features, train) == first
    others = [replace(SITE, **change) for change in ({"seed": 4}, {"client": "client-2"}, {"round": 3})]
    assert len({first, *(run(adapted, start, features, train, site) for site in others)}) == 4


def test_a_fit_leaves_the_global_generators_alone(
    adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig
) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 -- the global generator is what must not move
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    run(adapted, start, features, train)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_fit_trains_factors_and_head_and_nothing_else(
    adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig
) -> None:
    adapted.install(start, FrozenView())
    trained = {id(p) for p in adapted.trainable().values()}
    frozen = {name: p.detach().clone() for name, p in adapted.model.named_parameters() if id(p) not in trained}
    result = fit(adapted, TASK, features, train=replace(train, local_epochs=2), site=SITE)
    assert result.steps == 6  # eleven examples in batches of four, twice
    assert all(torch.equal(p, frozen[name]) for name, p in adapted.model.named_parameters() if name in frozen)
    assert all(not torch.equal(t, start[name]) for name, t in adapted.trained().items())
    assert not adapted.model.training


def gradients(adapted: AdaptedModel, start: State, now: State, batch: dict[str, Tensor], mu: float) -> dict[Any, Tensor]:
    """Return autograd's gradients of ``loss + mu/2 ‖x − x_server‖²``."""
    adapted.install(now, FrozenView())
    adapted.model.eval()
    parameters = adapted.trainable()
    for p in parameters.values():
        p.grad = None
    loss = TASK.loss(TASK.forward(adapted.model, batch), batch)
    explicit = loss + mu / 2 * sum((p - start[name]).square().sum() for name, p in parameters.items())
    explicit.backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def test_the_proximal_term_is_that_of_the_explicit_loss(tiny_bert: Path, start: State, features: list[dict[str, Any]]) -> None:
    """Two steps of plain SGD: the first one starts at the server's state, where the term's gradient is zero."""
    mu, rate = 0.7, 0.05
    config = load(["model=pretrained", f"model.name='{tiny_bert}'", "rank=2", "model.config={}"])
    still = build_model(config.model, config.adapter, family="lora", task=TASK, labels=("a", "b", "c"), seed=0)
    for module in still.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    options = {"optimizer": "sgd", "lr": rate, "momentum": 0.0, "local_steps": 2, "batch_size": 4, "bucket": 1}
    train = replace(config.train, prox_mu=mu, **options)
    still.install(start, FrozenView())
    fit(still, TASK, features, train=train, site=SITE)
    found = still.trained()

    expected = start
    for indices in plan_batches([len(f["input_ids"]) for f in features], train, SITE):
        step = gradients(still, start, expected, collate([features[i] for i in indices], still, TASK), mu)
        expected = State({name: t - rate * step[name] for name, t in expected.items()})
    assert all(torch.allclose(t, expected[name], rtol=1e-5, atol=1e-7) for name, t in found.items())

    still.install(start, FrozenView())
    fit(still, TASK, features, train=replace(train, prox_mu=0.0), site=SITE)
    assert any(not torch.allclose(t, expected[name], rtol=1e-5, atol=1e-7) for name, t in still.trained().items())


def test_clipping_bounds_the_step_of_plain_sgd(
    adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig
) -> None:
    """One step moves by rate · min(‖g‖, clip)."""
    adapted.install(start, FrozenView())
    clipped = replace(train, optimizer="sgd", lr=1.0, local_steps=1, clip_norm=1e-3)
    fit(adapted, TASK, features, train=clipped, site=SITE)
    moved = torch.stack([(t - start[name]).double().norm() for name, t in adapted.trained().items()]).norm()
    assert float(moved) == pytest.approx(1e-3, rel=1e-2)


def test_autocast_trains_in_bfloat16_and_keeps_float32_factors(
    adapted: AdaptedModel, start: State, features: list[dict[str, Any]], train: TrainConfig
) -> None:
    mixed = replace(train, autocast="bfloat16")
    assert run(adapted, start, features, mixed) != run(adapted, start, features, train)
    assert all(p.dtype == torch.float32 for p in adapted.trainable().values())
    with autocast(mixed, torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("lying", ["dense", "with gaps"])
def test_a_gradient_that_lies_otherwise_than_its_parameter_moves_it_alike(lying: str) -> None:
    train = replace(load().train, optimizer="adamw", lr=0.1, weight_decay=0.01)
    torch.manual_seed(0)
    gradients = [torch.randn(6, 4).t() for _ in range(3)]
    memory = torch.ones(4, 12)
    own = nn.Parameter(torch.ones(4, 6) if lying == "dense" else memory[:, ::2])
    plain = nn.Parameter(torch.ones(4, 6))
    optimizers = OPTIMIZERS["adamw"]([own], train), torch.optim.AdamW([plain], lr=0.1, weight_decay=0.01)
    for gradient in gradients:
        for p, optimizer in zip((own, plain), optimizers, strict=True):
            p.grad = gradient.clone(memory_format=torch.preserve_format)
            assert p.grad.stride() != p.stride()
            optimizer.step()
    assert torch.allclose(own, plain, atol=1e-6)
    assert bool((memory[:, 1::2] == 1).all())
