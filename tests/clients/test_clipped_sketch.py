"""A clipped sum is that of a loop over single examples, and one of them changes it by C at most."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.private_evidence import ClippedSum, clipped_sketch
from fedsb.adapters.starts import Side
from fedsb.core.state import State, non_finite, subtract
from tests.clients.evidence_cases import Chain, adapt, chain, probes_for
from tests.clients.sketch_cases import SIDES, assert_clipped_sum, example_products, inputs, norm, parts, scaled_losses

sides = st.sampled_from(SIDES)
kinds = st.sampled_from([nn.Linear, Conv1D])


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
