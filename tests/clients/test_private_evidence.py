"""Clipped sums against a loop over single examples in float64, what one example can change, and the noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.private_evidence import ClippedSum, add_noise, clipped_sketch, poisson_sample
from fedsb.adapters import layers
from fedsb.adapters.linear import out_in
from fedsb.adapters.starts import Side
from fedsb.config.compose import load
from fedsb.core.rng import numpy_generator, torch_generator
from fedsb.core.state import Name, State, non_finite, squared_norm, subtract
from fedsb.models.adapted import AdaptedModel
from fedsb.models.build import build_model
from fedsb.models.collating import collate
from fedsb.privacy.forecast import forecast_snr
from fedsb.tasks.task import TASKS
from tests.clients.test_evidence import ROLES, Chain, DenseWatch, adapt, chain, probes_for

Losses = Callable[[nn.Module, Any], Tensor]
SIDES: tuple[Side, Side] = ("right", "left")
BATCHES: tuple[int, ...] = (3, 1, 2)
sides = st.sampled_from(SIDES)
kinds = st.sampled_from([nn.Linear, Conv1D])


def scaled_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Losses of a chain whose gradients are as large as one likes."""
    x, scales = batch
    return scales.to(x.dtype) * model(x).square().flatten(1).sum(1)


def parts(batch: Any, *counts: int) -> list[Any]:
    """Split (x, scales) into micro-batches."""
    return list(zip(*[t.split(counts) for t in batch], strict=True))


def inputs(scales: Sequence[float], *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(len(scales), *shape, generator=torch_generator(0, "inputs")), torch.tensor(scales)


def as_double(batch: Any) -> Any:
    return tuple(t.double() for t in batch) if isinstance(batch, tuple) else batch


def example_products(model: nn.Module, losses: Losses, examples: Sequence[Any], probes: State, side: Side) -> list[State]:
    """One state an example, from the dense float64 gradient of that example's loss alone."""
    model = copy.deepcopy(model).double().eval()
    for layer in layers(model).values():
        layer.active = False
        layer.base.weight.requires_grad_(True)
    found = []
    for example in examples:
        model.zero_grad()
        losses(model, as_double(example)).sum().backward()
        dense = {name: out_in(layer.base, layer.base.weight.grad) for name, layer in layers(model).items()}
        turned = {name: g if side == "right" else g.T for name, g in dense.items()}
        found.append(State({Name(name.module, ROLES[side]): turned[name.module] @ probe.double() for name, probe in probes.items()}))
    return found


def norm(state: State) -> float:
    return math.sqrt(squared_norm(state))


def clipped(products: Sequence[State], max_norm: float, normalise: bool) -> State:
    factors = [max_norm / norm(p) if normalise else min(1.0, max_norm / norm(p)) for p in products]
    return State({name: sum(f * p[name] for f, p in zip(factors, products, strict=True)) for name in products[0]})


def assert_clipped_sum(found: ClippedSum, products: Sequence[State], max_norm: float, normalise: bool) -> None:
    wanted = clipped(products, max_norm, normalise)
    assert set(found.sum) == set(wanted)
    assert all(t.dtype == torch.float64 and t.device.type == "cpu" for t in found.sum.values())
    assert norm(subtract(found.sum, wanted)) < 1e-5 * sum(min(norm(p), max_norm) for p in products) + 2e-5 * max_norm * normalise
    assert found.num_examples == len(products)
    # A norm that is C up to rounding may count either way.
    assert found.num_clipped in {sum(norm(p) > c * max_norm for p in products) for c in (1 - 1e-5, 1 + 1e-5)}


@settings(max_examples=30, deadline=None)
@given(
    kind=kinds,
    side=sides,
    sizes=st.tuples(*[st.integers(2, 9)] * 3),
    between=st.lists(st.integers(1, 3), max_size=2),
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 4),
    quantile=st.floats(0, 1),
    normalise=st.booleans(),
)
def test_sum_equals_a_loop_over_single_examples(
    kind: type[nn.Module],
    side: Side,
    sizes: tuple[int, int, int],
    between: list[int],
    counts: list[int],
    width: int,
    quantile: float,
    normalise: bool,
) -> None:
    model = chain(kind, sizes)
    batch = inputs([4.0 ** (i % 5 - 2) for i in range(sum(counts))], *between, sizes[0])
    probes = probes_for(model, side, width)
    products = example_products(model, scaled_losses, parts(batch, *[1] * sum(counts)), probes, side)
    max_norm = float(torch.tensor([norm(p) for p in products]).quantile(quantile))
    found = clipped_sketch(model, parts(batch, *counts), scaled_losses, probes=probes, side=side, max_norm=max_norm, normalise=normalise)
    assert_clipped_sum(found, products, max_norm, normalise)


@cache
def language_model(folder: Path, task: str) -> AdaptedModel:
    config = load(["model=pretrained", f"model.name='{folder}'", "rank=2", "adapter.dropout=0.2"])
    return build_model(config.model, config.adapter, family="lora_sb", task=TASKS[task], labels=("a", "b", "c"), seed=0)


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def case(request: pytest.FixtureRequest) -> tuple[AdaptedModel, Losses, Callable[..., list[Any]]]:
    """A language model, its losses, and batches of 6 texts of unequal length with given sizes."""
    task = TASKS[{"tiny_bert": "classification", "tiny_gpt2": "causal_lm"}[request.param]]
    adapted = language_model(request.getfixturevalue(request.param), task.name)
    draw = numpy_generator(0, "texts")
    texts = [{"input_ids": draw.integers(4, 30, n).tolist(), "target": n % 3} for n in (2, 9, 5, 3, 12, 7)]

    def batches(*counts: int) -> list[Any]:
        ends = [sum(counts[: i + 1]) for i in range(len(counts))]
        return [collate(texts[end - count : end], adapted, task) for end, count in zip(ends, counts, strict=True)]

    return adapted, lambda model, batch: task.losses(task.forward(model, batch), batch), batches


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("side", SIDES)
def test_sum_on_language_models_whatever_the_micro_batches(case: Any, side: Side, normalise: bool) -> None:
    """The single examples are without padding, the micro-batches with."""
    adapted, losses, batches = case
    probes = probes_for(adapted.model, side)
    products = example_products(adapted.model, losses, batches(*[1] * 6), probes, side)
    max_norm = sorted(norm(p) for p in products)[2] * 1.01
    for counts in (BATCHES, (6,), (1,) * 6):
        found = clipped_sketch(adapted.model, batches(*counts), losses, probes=probes, side=side, max_norm=max_norm, normalise=normalise)
        assert_clipped_sum(found, products, max_norm, normalise)


class Twice(Chain):
    """Calls a layer twice, so that an example's product has two parts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(torch.tanh(self.first(x))))


@pytest.mark.parametrize("side", SIDES)
def test_a_layer_that_is_called_twice(side: Side) -> None:
    model, batch = adapt(Twice(nn.Linear, (5, 5, 4))), inputs([1.0, 5.0, 0.2], 2, 5)
    probes = probes_for(model, side)
    products = example_products(model, scaled_losses, parts(batch, 1, 1, 1), probes, side)
    max_norm = sorted(norm(p) for p in products)[1] * 0.9
    found = clipped_sketch(model, [batch], scaled_losses, probes=probes, side=side, max_norm=max_norm)
    assert_clipped_sum(found, products, max_norm, normalise=False)


@settings(max_examples=40, deadline=None)
@given(
    kind=kinds,
    side=sides,
    scales=st.lists(st.sampled_from([0.0, 1e-40, 1e-22, 1e-3, 1.0, 7.0, 1e18, 1e30, 3e38, math.inf, math.nan]), min_size=1, max_size=6),
    where=st.integers(0, 5),
    max_norm=st.sampled_from([1e-6, 0.5, 300.0]),
    normalise=st.booleans(),
    micro=st.integers(1, 6),
)
def test_one_example_changes_the_sum_by_at_most_c(
    kind: type[nn.Module], side: Side, scales: list[float], where: int, max_norm: float, normalise: bool, micro: int
) -> None:
    """Removed or zeroed out, tiny, huge or broken, and whoever shares its micro-batch."""
    model = chain(kind, (4, 6, 5))
    x, factors = inputs(scales, 3, 4)
    one = where % len(scales)
    probes = probes_for(model, side)

    def sketch(x: Tensor, factors: Tensor) -> State:
        batches = list(zip(x.split(micro), factors.split(micro), strict=True)) if len(x) else []
        found = clipped_sketch(model, batches, scaled_losses, probes=probes, side=side, max_norm=max_norm, normalise=normalise)
        assert non_finite(found.sum) is None
        assert found.num_examples == len(x)
        return found.sum

    others = torch.arange(len(x)) != one
    whole = sketch(x, factors)
    rounding = 1 + 3e-7 * len(x)
    assert norm(subtract(whole, sketch(x[others], factors[others]))) <= max_norm * rounding
    assert norm(subtract(whole, sketch(x, torch.where(others, factors, 0.0)))) <= max_norm * rounding
    assert norm(sketch(x[~others], factors[~others])) <= max_norm


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("broken", [math.inf, math.nan, 3e38])
def test_a_broken_example_contributes_nothing_and_counts_as_clipped(broken: float, normalise: bool) -> None:
    model = chain(nn.Linear, (4, 6, 5))
    x, scales = inputs([1.0, broken, 2.0], 3, 4)
    x[1] *= 1e3
    rest = torch.tensor([0, 2])

    def sketch(batch: tuple[Tensor, Tensor]) -> ClippedSum:
        probes = probes_for(model, "right")
        return clipped_sketch(model, [batch], scaled_losses, probes=probes, side="right", max_norm=1e6, normalise=normalise)

    found, wanted = sketch((x, scales)), sketch((x[rest], scales[rest]))
    assert norm(subtract(found.sum, wanted.sum)) < 1e-6 * norm(wanted.sum)
    assert (found.num_clipped, found.num_examples) == (1, 3)
    assert wanted.num_clipped == 0


def test_normalised_examples_have_norm_c_and_zero_stays_zero() -> None:
    model, probes = chain(nn.Linear, (4, 6, 5)), probes_for(chain(nn.Linear, (4, 6, 5)), "left")
    for scale, wanted in ((1e-30, 0.7), (1.0, 0.7), (1e20, 0.7), (0.0, 0.0)):
        found = clipped_sketch(model, [inputs([scale], 2, 4)], scaled_losses, probes=probes, side="left", max_norm=0.7, normalise=True)
        assert norm(found.sum) == pytest.approx(wanted, rel=2e-6)
        assert norm(found.sum) <= 0.7


@pytest.mark.parametrize("side", SIDES)
def test_no_tensor_of_the_gradients_size_is_made(case: Any, side: Side) -> None:
    adapted, losses, batches = case
    # With these sizes no activation has as many values as a gradient.
    probes, drawn = probes_for(adapted.model, side), batches(3, 1)
    with DenseWatch(adapted.model) as watch:
        clipped_sketch(adapted.model, drawn, losses, probes=probes, side=side, max_norm=1.0)
    assert watch.found == []


@pytest.mark.parametrize("side", SIDES)
def test_an_empty_sample_gives_zeros_that_still_get_noise(side: Side) -> None:
    model = chain(nn.Linear, (120, 200, 150))
    probes = probes_for(model, side, 40)
    rows = {name: layer.shape[SIDES.index(side)] for name, layer in layers(model).items()}
    for batches in ([], [inputs([], 3, 120)]):
        found = clipped_sketch(model, batches, scaled_losses, probes=probes, side=side, max_norm=0.5)
        assert {name: tuple(t.shape) for name, t in found.sum.items()} == {Name(n, ROLES[side]): (m, 40) for n, m in rows.items()}
        assert (norm(found.sum), found.num_clipped, found.num_examples) == (0.0, 0, 0)
    release = add_noise(found, noise_multiplier=3.0, max_norm=0.5, expected=10.0, generator=torch_generator(0, "noise"))
    values = torch.cat([t.flatten() for t in release.values()])
    assert values.dtype == torch.float32
    assert float(values.std()) == pytest.approx(3.0 * 0.5 / 10, rel=0.02)
    assert abs(float(values.mean())) < 4 * 0.15 / math.sqrt(len(values))
    assert float((values.abs() < 0.15).float().mean()) == pytest.approx(0.6827, abs=0.015)
    first, second = (t.flatten()[:4800] for t in release.values())
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.06


def test_noise_is_added_before_the_sum_is_rounded() -> None:
    """A float32 has steps of 2 from 2^24 on: a sum that was rounded first would not show that it is one longer."""
    total = ClippedSum(State({Name("m", "Y"): torch.full((100, 100), 2.0**24 + 1, dtype=torch.float64)}), 0, 1)
    release = add_noise(total, noise_multiplier=1.0, max_norm=1.0, expected=1.0, generator=torch_generator(0, "noise"))
    assert float((release[Name("m", "Y")].double() - 2.0**24).mean()) == pytest.approx(1, abs=6 * 1.2 / 100)


def test_noise_is_added_to_the_sum_in_sorted_order_and_divided_by_the_expected_number() -> None:
    names = [Name("b", "Y"), Name("a", "Y")]
    total = ClippedSum(State({name: torch.full((3, 2), 6.0) for name in names}), 0, 5)
    drawn = torch_generator(1, "noise")
    wanted = {name: ((6.0 + 0.5 * torch.randn(3, 2, generator=drawn, dtype=torch.float64)) / 4.0).float() for name in sorted(names)}
    found = add_noise(total, noise_multiplier=0.25, max_norm=2.0, expected=4.0, generator=torch_generator(1, "noise"))
    assert all(torch.equal(found[name], t) for name, t in wanted.items())
    for bad in ({"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"max_norm": -1.0}, {"expected": 0.0}):
        settings_ = {"noise_multiplier": 1.0, "max_norm": 1.0, "expected": 1.0, **bad}
        with pytest.raises(ValueError, match="noise_multiplier"):
            add_noise(total, generator=drawn, **settings_)


def test_poisson_samples_are_independent_draws() -> None:
    drawn = torch_generator(0, "sample")
    samples = [poisson_sample(50, 0.2, drawn) for _ in range(2000)]
    assert all(sample == sorted(set(sample)) and set(sample) <= set(range(50)) for sample in samples)
    sizes = torch.tensor([float(len(sample)) for sample in samples])
    # A binomial's mean and variance; samples of fixed size would have no variance.
    assert float(sizes.mean()) == pytest.approx(10, abs=0.3)
    assert float(sizes.var()) == pytest.approx(8, rel=0.15)
    hits = torch.bincount(torch.tensor([i for sample in samples for i in sample]), minlength=50) / 2000
    assert float((hits - 0.2).abs().max()) < 0.045
    assert poisson_sample(50, 0.2, torch_generator(0, "sample")) == samples[0]


def test_poisson_samples_at_the_ends() -> None:
    drawn = torch_generator(0, "sample")
    assert poisson_sample(4, 1.0, drawn) == [0, 1, 2, 3]
    assert poisson_sample(4, 0.0, drawn) == []
    assert poisson_sample(0, 0.5, drawn) == []
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            poisson_sample(4, rate, drawn)


@pytest.mark.parametrize("side", SIDES)
def test_aligned_examples_reach_the_forecast_and_others_stay_below(side: Side) -> None:
    model, sigma = chain(nn.Linear, (40, 70, 30)), 2.0
    probes = probes_for(model, side, 20)
    x, scales = inputs([1.0] * 8, 1, 40)
    shapes = {name: layer.shape for name, layer in layers(model).items()}
    forecast = forecast_snr(sigma, 0.3, 8, shapes, lambda m, n: min(20, m, n), side)

    def ratio(x: Tensor) -> float:
        found = clipped_sketch(model, [(x, scales)], scaled_losses, probes=probes, side=side, max_norm=0.3, normalise=True)
        noised = add_noise(found, noise_multiplier=sigma, max_norm=0.3, expected=1.0, generator=torch_generator(0, "noise"))
        return norm(found.sum) / norm(subtract(noised, found.sum))

    assert ratio(x[:1].expand_as(x)) == pytest.approx(forecast, rel=0.05)
    assert ratio(x) < 0.9 * forecast
    assert forecast_snr(0.0, 0.3, 8, shapes, lambda m, n: min(20, m, n), side) == math.inf


def test_model_and_global_generator_are_left_as_found(case: Any) -> None:
    adapted, losses, batches = case
    model = adapted.model.train()
    trainable, before = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    found = [
        clipped_sketch(model, batches(*BATCHES), losses, probes=probes_for(model, "right"), side="right", max_norm=0.1).sum
        for _ in range(2)
    ]
    assert norm(subtract(*found)) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert_left_alone(model, trainable)


def assert_left_alone(model: nn.Module, trainable: list[bool]) -> None:
    assert all(module.training for module in model.modules())
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


class TokensFirst(Chain):
    """Hands its layers rows that belong to no example in particular."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(len(x), -1)


def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    scaled_losses(model, batch)
    raise RuntimeError("no losses")


@pytest.mark.parametrize(
    ("build", "losses", "error", "message"),
    [
        (Chain, failing, RuntimeError, "no losses"),
        (Chain, lambda model, batch: scaled_losses(model, batch).mean(), ValueError, "one loss per example"),
        (Chain, lambda model, batch: batch[1], ValueError, "depends on no adapted layer"),
        (TokensFirst, scaled_losses, ValueError, "'second' is given 6 rows for 2 examples"),
    ],
)
@pytest.mark.parametrize("side", SIDES)
def test_model_is_restored_when_it_is_refused(build: type[Chain], losses: Losses, error: type[Exception], message: str, side: Side) -> None:
    model = adapt(build(nn.Linear, (5, 4, 3))).train()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        clipped_sketch(model, [inputs([1.0, 1.0], 3, 5)], losses, probes=probes_for(model, side), side=side, max_norm=1.0)
    assert_left_alone(model, trainable)


def test_wrong_probes_and_norms_are_refused() -> None:
    model = chain(nn.Linear, (5, 4, 3))
    with pytest.raises(ValueError, match=r"probes for \['elsewhere'\] don't fit the adapted layers"):
        clipped_sketch(model, [], scaled_losses, probes=State({Name("elsewhere", "P"): torch.ones(5, 2)}), side="right", max_norm=1.0)
    for max_norm in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            clipped_sketch(model, [], scaled_losses, probes=probes_for(model, "right"), side="right", max_norm=max_norm)
