"""The clipping itself, on gradients made by hand, and adaptive clipping through the real path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clients.clipping import CLIPPINGS, Clipping, FlatClipping
from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.privacy.adaptive import sum_multiplier
from fedsb.privacy.sampling import GRID
from tests.clients.private_cases import Case, Step, clipped_sum, distance, drawn, fit, make_case, mechanism, watch

SCALES = [0.0, 1e-40, 1e-25, 1e-3, 1.0, 1e18, 1e25, 3e37, math.inf, -math.inf, math.nan]
kinds = st.sampled_from(sorted(CLIPPINGS))
RAREST = 1 / GRID  # the smallest rate at which anything is drawn


@pytest.fixture(scope="module")
def small(tiny_bert: Path) -> Case:
    return make_case(tiny_bert, "classification", "head_only")


def optimizer(clipping: Clipping, *shapes: Sequence[int], expected: float = 1.0) -> FlatClipping:
    parameters = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
    generator = torch_generator(0, "noise")
    return CLIPPINGS[clipping.kind](torch.optim.SGD(parameters, lr=1.0), clipping, expected_batch=expected, generator=generator)


def take(found: FlatClipping, *samples: Tensor) -> list[Tensor]:
    """Hand a batch over and return its clipped sum."""
    found.zero_grad(set_to_none=True)
    for p, sample in zip(found.params, samples, strict=True):
        p.grad_sample = sample
    found.clip_and_accumulate()
    return [p.summed_grad.clone() for p in found.params]


def made(scales: Sequence[float]) -> tuple[Tensor, Tensor]:
    factors = torch.tensor(scales)
    draws = [torch.randn(len(scales), *shape, generator=torch_generator(0, "samples", *shape)) for shape in ((4, 3), (5,))]
    first, second = (t * factors.view(-1, *[1] * (t.dim() - 1)) for t in draws)
    return first, second


def length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


@settings(max_examples=60, deadline=None)
@given(kinds, st.lists(st.sampled_from(SCALES), min_size=1, max_size=6), st.integers(0, 5), st.sampled_from([1e-6, 0.5, 300.0]))
def test_one_example_changes_the_sum_by_at_most_c(kind: str, scales: list[float], where: int, max_norm: float) -> None:
    """Removed or zeroed out, tiny, huge or broken."""
    clipping = Clipping(kind, max_norm, 1.0)
    one = where % len(scales)
    samples = made(scales)
    whole = take(optimizer(clipping, (4, 3), (5,)), *samples)
    assert all(bool(t.isfinite().all()) for t in whole)
    kept = [torch.cat([t[:one], t[one + 1 :]]) for t in samples]
    without = take(optimizer(clipping, (4, 3), (5,)), *kept)
    zeroed = take(optimizer(clipping, (4, 3), (5,)), *[t.index_fill(0, torch.tensor([one]), 0.0) for t in samples])
    for other in (without, zeroed):
        assert length([a - b for a, b in zip(whole, other, strict=True)]) <= max_norm * (1 + 1e-5)


@pytest.mark.parametrize("kind", sorted(CLIPPINGS))
@pytest.mark.parametrize("size", [3, 3_000_000])
def test_no_example_is_longer_than_c(kind: str, size: int) -> None:
    """Also over a large head, where a norm summed up in float32 is short by some 1e-5."""
    samples = [torch.randn(1, size, generator=torch_generator(0, "large", i)) for i in range(2)]
    found = length(take(optimizer(Clipping(kind, 1.0, 1.0), (size,), (size,)), *samples))
    assert 1 - 1e-5 < found <= 1 + 1e-9


def test_accumulated_batches_are_one() -> None:
    samples = made([0.1, 5.0, 1.0, 0.3, math.nan, 2.0])
    for kind in CLIPPINGS:
        whole = take(optimizer(Clipping(kind, 1.0, 1.0), (4, 3), (5,)), *samples)
        found = optimizer(Clipping(kind, 1.0, 1.0), (4, 3), (5,))
        for part in (slice(0, 2), slice(2, 2), slice(2, 6)):
            for p, sample in zip(found.params, samples, strict=True):
                p.grad_sample = sample[part]
            found.clip_and_accumulate()
        assert length([a - p.summed_grad for a, p in zip(whole, found.params, strict=True)]) < 1e-6
        assert found.log.examples == 6


@pytest.mark.parametrize("kind", sorted(CLIPPINGS))
def test_noise_is_added_before_the_sum_is_rounded(kind: str) -> None:
    """A float32 has steps of 2 from 2^24 on: a sum that was rounded first would not show the ones that the second batch adds."""
    found = optimizer(Clipping(kind, 2.0**40, 2.0**-40), (10_000,))
    for last, value in enumerate([2.0**24, 1.0]):
        found.signal_skip_step(do_skip=not last)
        found.zero_grad(set_to_none=True)
        found.params[0].grad_sample = torch.full((1, 10_000), value)
        found.pre_step()
    mean = float((found.params[0].grad.double() - 2.0**24).mean())
    assert mean == pytest.approx(1, abs=6 * 1.2 / 100)


def test_c_does_not_go_below_what_noise_can_cover() -> None:
    found = optimizer(Clipping("adaptive", 1e-6, 1.0, quantile_lr=5.0, quantile=0.9), (1,))
    for _ in range(9):
        found.zero_grad(set_to_none=True)
        found.params[0].grad_sample = torch.full((50, 1), 1e-12)
        found.pre_step()
        assert found.max_grad_norm >= 1e-6


def empty_steps(small: Case, **options: Any) -> list[Step]:
    return watch(small, mechanism(0.5, rate=RAREST, **options))


def noise_of(step: Step, expected: float) -> float:
    return float(torch.cat([t.double().flatten() for t in step.grad.values()]).std()) * expected


@pytest.mark.parametrize(("sigma", "count_noise"), [(1.0, 0.6), (0.7, 5.0), (6.0, 3.2)])
def test_gradients_get_the_noise_that_the_count_leaves(small: Case, sigma: float, count_noise: float) -> None:
    """σ⁻² = σ_Δ⁻² + (2 σ_b)⁻², at C as it was in the step: a Gaussian's cost is in 1/σ², and a count from −1/2 has sensitivity 1/2."""
    steps = empty_steps(small, sigma=sigma, kind="adaptive", count_noise=count_noise, steps=25)
    raised = steps[0].noise_multiplier
    assert raised**-2 + (2 * count_noise) ** -2 == pytest.approx(sigma**-2)
    size = sum(t.numel() for t in steps[0].grad.values())
    ratios = [noise_of(step, RAREST * len(small.features)) / (raised * step.max_norm) for step in steps]
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=4 / math.sqrt(2 * size * len(steps)))
    assert len({step.max_norm for step in steps}) > 1


@pytest.mark.parametrize("max_batch", [3, 32])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_c_moves_by_the_share_of_the_norms_below_it(small: Case, share: float, max_batch: int) -> None:
    """The count is divided by the expected batch, not by the drawn one."""
    rate, quantile, speed = 0.6, 0.5, 0.4
    start = sorted(small.norms)[int(share * len(small.norms))] * 1.001
    how = mechanism(start, sigma=1e-9, kind="adaptive", quantile=quantile, quantile_lr=speed, count_noise=1e-6, rate=rate, steps=2)
    how = replace(how, max_batch=max_batch)
    before, after = watch(small, how)
    sample = drawn(small, rate)
    assert len(sample) != rate * 10
    assert distance(before.sum, clipped_sum([small.oracle[i] for i in sample], start)) < 1e-5 * start
    below = sum(small.norms[i] <= start for i in sample)
    moved = min(1.0, max(0.0, 0.5 + (below - 0.5 * len(sample)) / (rate * 10)))
    assert after.max_norm == pytest.approx(start * math.exp(-speed * (moved - quantile)), rel=1e-5)


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_c_goes_to_the_quantile(small: Case, start: float) -> None:
    ordered = sorted(small.norms)
    how = mechanism(start * ordered[5], sigma=0.5, kind="adaptive", quantile=0.5, count_noise=0.5, rate=0.8, steps=60)
    found = fit(small, how, lr=1e-9).diagnostics["clip_norm"]
    assert found == pytest.approx(ordered[5], rel=0.1)


@pytest.mark.parametrize("gone", [0.2, 3.0, math.nan])
def test_zeroing_one_example_out_moves_the_count_by_a_half_at_most(gone: float) -> None:
    """What the noise on the count is scaled to; a gradient of zero is that of an example that is not there."""
    counts = []
    for values in ([0.3, 5.0, gone], [0.3, 5.0, 0.0], [0.3, 5.0]):
        found = optimizer(Clipping("adaptive", 1.0, 1.0, quantile_lr=1.0, quantile=0.5, count_noise=7.0), (1,), expected=100.0)
        found.zero_grad(set_to_none=True)
        found.params[0].grad_sample = torch.tensor(values)[:, None]
        found.pre_step()
        counts.append(-math.log(found.max_grad_norm) * 100)
    assert abs(counts[0] - counts[1]) == pytest.approx(0.0 if math.isnan(gone) else 0.5, abs=1e-9)
    assert counts[1] == pytest.approx(counts[2], abs=1e-9)


def test_noise_of_the_count_is_drawn_with_its_deviation() -> None:
    """On empty samples of an expected batch so large that no share is cut off."""
    found = optimizer(Clipping("adaptive", 1.0, 1.0, quantile_lr=1.0, quantile=0.0, count_noise=7.0), (1,), expected=100.0)
    shares, last = [], 1.0
    for _ in range(2000):
        found.zero_grad(set_to_none=True)
        found.params[0].grad_sample = torch.zeros(0, 1)
        found.pre_step()
        shares.append(-math.log(found.max_grad_norm / last))
        found.max_grad_norm = last = 1.0
    values = torch.tensor(shares, dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(0.5, abs=4 * 0.07 / math.sqrt(2000))
    assert float(values.std()) == pytest.approx(0.07, rel=4 / math.sqrt(4000))


def test_too_little_noise_on_the_count_is_refused_in_one_line() -> None:
    assert sum_multiplier(0.0, 1.0) == 0.0
    for sigma in (10.0, 11.0):
        with pytest.raises(UserError, match=r"privacy\.count_noise=5\.0 must be above half of the noise multiplier 1\d") as error:
            Clipping("adaptive", 1.0, sigma)
        assert "\n" not in str(error.value)
        Clipping("flat", 1.0, sigma)


def test_a_long_sum_is_that_of_its_gradients_and_one_more_moves_it_by_c() -> None:
    """In a single batch, each clipped to C: added up in float32 all through, 100,000 that are alike were 67 C away from what they are."""
    alike = (10 * (torch.rand(1, 8, generator=torch_generator(0, "alike")) + 0.1)).expand(100_000, 8).contiguous()
    sums = []
    for batch in (alike, alike[1:]):
        found = optimizer(Clipping("flat", 1.0, 1.0), (8,))
        found.params[0].grad_sample = batch
        found.clip_and_accumulate()
        sums.append(found._sums[0])
        exact = len(batch) * (1 - 1e-6) * nn.functional.normalize(alike[0].double(), dim=0)
        assert float((sums[-1] - exact).norm()) <= 2e-6 * len(batch)
    assert float((sums[0] - sums[1]).norm()) <= 1 + 1e-4
