"""The private mean against plain loops, its sensitivity, its noise, and the bound that follows a quantile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Layout, Name, State, squared_norm, subtract
from strategies.privacy.mean import ClippingBound, PrivateMean, PrivateSum
from strategies.reducers import Aggregate, Reducer

law = settings(max_examples=25, deadline=None)
A, B, HEADS = Name("x", "A"), Name("x", "B"), Name("c", HEAD)


@dataclass(frozen=True)
class Case:
    """What clients were sent, what they send back, and the bound on the difference."""

    current: State
    uploads: tuple[State, ...]
    clip: float


@st.composite
def cases(draw: st.DrawFn, max_clients: int = 5) -> Case:
    """Updates within the bound, around it and, up to float32's largest, far beyond it."""
    shapes = {A: (2, draw(st.integers(1, 6))), B: (draw(st.integers(1, 6)), 2), HEADS: (3,)}
    seed = draw(st.integers(0, 2**32))
    sizes = draw(st.lists(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4, 1e37]), min_size=1, max_size=max_clients))
    current = gaussian(shapes, seed)
    uploads = (State({n: current[n] + size * t for n, t in gaussian(shapes, seed + 1 + i).items()}) for i, size in enumerate(sizes))
    return Case(current, tuple(uploads), draw(st.sampled_from([1e-3, 0.5, 4.0, 1e3])))


def gaussian(shapes: dict[Name, tuple[int, ...]], seed: int) -> State:
    generator = torch_generator(seed, "test")
    return State({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def reducer(bound: ClippingBound | float, z: float = 0.0, cohort: int = 5, generator: torch.Generator | None = None) -> PrivateMean:
    bound = bound if isinstance(bound, ClippingBound) else ClippingBound.fixed(bound)
    return PrivateMean(
        bound=bound, noise_multiplier=z, cohort=cohort, generator=generator or torch_generator(0, "noise")
    )  # fmt: skip


def run(rule: Reducer, current: State, uploads: Sequence[State]) -> Aggregate:
    rule.begin(current)
    for upload in uploads:
        rule.add(upload, 1.0)
    return rule.finish()


def flat(state: State) -> list[float]:
    return [value for t in state.values() for value in t.double().reshape(-1).tolist()]


def slow_mean(case: Case, cohort: int) -> list[float]:
    """Clip, sum and divide value by value."""
    start = flat(case.current)
    total = [0.0] * len(start)
    for upload in case.uploads:
        update = [new - old for new, old in zip(flat(upload), start, strict=True)]
        norm = math.sqrt(math.fsum(value * value for value in update))
        factor = min(1.0, case.clip / norm) if norm else 1.0
        total = [left + factor * right for left, right in zip(total, update, strict=True)]
    return [old + value / cohort for old, value in zip(start, total, strict=True)]


@law
@given(cases(), st.integers(1, 9))
def test_without_noise_it_is_that_of_a_slow_loop(case: Case, cohort: int) -> None:
    aggregate = run(reducer(case.clip, cohort=cohort), case.current, case.uploads)
    assert flat(aggregate.state) == pytest.approx(slow_mean(case, cohort), rel=1e-12, abs=1e-12 * case.clip)
    assert len(aggregate.log) == 0


@law
@given(cases(), st.data())
def test_one_client_moves_the_sum_by_at_most_the_bound(case: Case, data: st.DataObject) -> None:
    """Over factors and head jointly, whatever its size; its leaving changes no divisor."""
    left_out = data.draw(st.integers(0, len(case.uploads) - 1))
    others = [upload for i, upload in enumerate(case.uploads) if i != left_out]
    cohort = 7
    means = [run(reducer(case.clip, cohort=cohort), case.current, uploads).state for uploads in (case.uploads, others)]
    moved = cohort * math.sqrt(squared_norm(subtract(*means)))
    assert moved <= case.clip * (1 + 1e-9) + 1e-12
    distance = math.sqrt(squared_norm(subtract(case.uploads[left_out].map(torch.Tensor.double), case.current)))
    assert moved == pytest.approx(min(case.clip, distance), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_adds_zero(broken: float) -> None:
    current, upload, bad = (gaussian({A: (2, 3), HEADS: (3,)}, seed) for seed in (1, 2, 3))
    bad[HEADS][1] = broken
    bounds = [ClippingBound(1.0, quantile=0.7, rate=0.5) for _ in range(2)]
    alone = run(reducer(bounds[0]), current, [upload]).state
    both = run(reducer(bounds[1]), current, [upload, bad]).state
    assert flat(alone) == flat(both)
    assert bounds[0] == bounds[1]


def test_the_divisor_is_the_schedule_not_the_answers() -> None:
    current = State({A: torch.zeros(2, 2)})
    upload = State({A: torch.ones(2, 2)})
    for answered in range(5):
        aggregate = run(reducer(10.0, cohort=4), current, [upload] * answered)
        assert flat(aggregate.state) == [answered / 4] * 4
        assert aggregate.extras == {"clip_norm": 10.0, "noise_std": 0.0}


@law
@given(cases(), st.data())
def test_order_changes_rounding_at_most(case: Case, data: st.DataObject) -> None:
    uploads = data.draw(st.permutations(case.uploads))
    plain = run(reducer(case.clip, 0.8), case.current, case.uploads).state
    moved = run(reducer(case.clip, 0.8), case.current, uploads).state
    assert flat(moved) == pytest.approx(flat(plain), rel=1e-12, abs=1e-12 * case.clip)


@law
@given(cases(), cases())
def test_a_round_forgets_the_round_before(first: Case, second: Case) -> None:
    used = reducer(second.clip)
    run(used, first.current, first.uploads)
    again, fresh = (run(rule, second.current, second.uploads) for rule in (used, reducer(second.clip)))
    assert flat(again.state) == flat(fresh.state)
    assert again.extras == fresh.extras


@law
@given(cases())
def test_uploads_are_not_changed(case: Case) -> None:
    before = [flat(state) for state in (case.current, *case.uploads)]
    run(reducer(case.clip, 1.0), case.current, case.uploads)
    assert before == [flat(state) for state in (case.current, *case.uploads)]


@law
@given(cases(), st.floats(0.1, 5))
def test_equal_streams_give_equal_bits_and_one_stream_runs_on(case: Case, z: float) -> None:
    def state(generator: torch.Generator) -> list[float]:
        return flat(run(reducer(case.clip, z, generator=generator), case.current, case.uploads).state)

    generator = torch_generator(3, "noise", 1)
    first = state(generator)
    assert first == state(torch_generator(3, "noise", 1))
    assert first != state(generator)
    assert first != state(torch_generator(3, "noise", 2))


@law
@given(cases(), st.floats(0, 5))
def test_the_noise_does_not_depend_on_the_data(case: Case, z: float) -> None:
    """The same stream gives the same noise whatever the uploads, so what is private rests on the clipped sum alone."""
    noisy, plain = (run(reducer(case.clip, level), case.current, case.uploads).state for level in (z, 0.0))
    nothing = run(reducer(case.clip, z), case.current, []).state
    noise = [left - right for left, right in zip(flat(nothing), flat(case.current), strict=True)]
    wanted = [left + right for left, right in zip(flat(plain), noise, strict=True)]
    assert flat(noisy) == pytest.approx(wanted, rel=1e-9, abs=1e-9 * case.clip)


@pytest.mark.parametrize(("clip", "z", "cohort"), [(0.5, 1.2, 10), (3.0, 0.3, 4)])
def test_the_noise_has_the_spread_that_is_said(clip: float, z: float, cohort: int) -> None:
    layout = {A: (100, 200), B: (50, 100), HEADS: (5000,)}
    current = State({name: torch.zeros(shape) for name, shape in layout.items()})
    rule = reducer(clip, z, cohort)
    aggregate = run(rule, current, [gaussian(layout, seed) for seed in range(cohort)])
    noise = subtract(aggregate.state, run(reducer(clip, 0.0, cohort), current, [gaussian(layout, s) for s in range(cohort)]).state)
    assert aggregate.extras == {"clip_norm": clip, "noise_std": pytest.approx(z * clip / cohort)}
    for t in noise.values():
        values = t.reshape(-1) / aggregate.extras["noise_std"]
        assert abs(float(values.mean())) < 4 / math.sqrt(len(values))
        assert float(values.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(values)))
        assert float(values.abs().gt(1.96).double().mean()) == pytest.approx(0.05, abs=4 * math.sqrt(0.05 / len(values)))
    heads = noise[HEADS], noise[B].reshape(-1), noise[A].reshape(-1)[:5000]
    assert float(torch.corrcoef(torch.stack(heads)).triu(1).abs().max()) < 4 / math.sqrt(5000)


def test_rounds_on_one_stream_draw_noise_anew() -> None:
    rule = reducer(1.0, 1.0)
    current = State({A: torch.zeros(50, 50)})
    rounds = [run(rule, current, []).state[A].reshape(-1) for _ in range(3)]
    assert float(torch.corrcoef(torch.stack(rounds)).triu(1).abs().max()) < 4 / 50


@law
@given(cases(), cases())
def test_the_extras_of_a_fixed_bound_do_not_depend_on_uploads(first: Case, second: Case) -> None:
    assert run(reducer(0.7, 1.1), first.current, first.uploads).extras == run(reducer(0.7, 1.1), second.current, second.uploads).extras


def test_diagnostics_stay_out_of_the_extras() -> None:
    current = State({A: torch.zeros(1, 4)})
    rule = reducer(2.0, 0.5, cohort=4)
    aggregate = run(rule, current, [State({A: torch.full((1, 4), size)}) for size in (0.5, 1.0, 4.0)])
    assert aggregate.extras.keys() == {"clip_norm", "noise_std"}
    # Norms 1, 2, 8 are clipped to 1, 2, 2; the noise has the norm 0.5 · 2 · √4.
    assert rule.diagnostics == {"clip_rate": pytest.approx(1 / 3), "signal_to_noise": pytest.approx(5 / 2)}


def test_unequal_weights_are_refused_and_equal_ones_do_not_matter() -> None:
    current, upload = (gaussian({A: (2, 3)}, seed) for seed in (1, 2))
    rule = reducer(1.0)
    rule.begin(current)
    rule.add(upload, 30.0)
    with pytest.raises(ValueError, match=r"weights 30\.0 and 31\.0 in one private round; use federation\.weighting=uniform"):
        rule.add(upload, 31.0)
    rule.begin(current)
    rule.add(upload, 31.0)
    assert flat(rule.finish().state) == flat(run(reducer(1.0), current, [upload]).state)


def test_a_state_of_another_layout_is_refused() -> None:
    total = PrivateSum(Layout.of(State({A: torch.zeros(2, 3)})), clip=1.0, noise_multiplier=1.0, divisor=2, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"a state does not fit the private sum: A of 'x' is \(1, 3\), expected \(2, 3\)"):
        total.add(State({A: torch.zeros(1, 3)}))


def test_a_sum_is_released_once() -> None:
    total = PrivateSum(Layout.of(State({A: torch.zeros(2, 3)})), clip=1.0, noise_multiplier=1.0, divisor=2, generator=torch.Generator())
    total.mean()
    with pytest.raises(AssertionError):
        total.mean()


@law
@given(cases(), st.floats(0.1, 3), st.integers(1, 9))
def test_a_start_and_a_round_share_one_mechanism(case: Case, z: float, divisor: int) -> None:
    total = PrivateSum(
        Layout.of(case.current), clip=case.clip, noise_multiplier=z, divisor=divisor, generator=torch_generator(0, "noise")
    )  # fmt: skip
    norms = [total.add(upload) for upload in case.uploads]
    zero = case.current.map(torch.zeros_like)
    assert flat(total.mean()) == flat(run(reducer(case.clip, z, divisor), zero, case.uploads).state)
    assert norms == pytest.approx([math.dist(flat(upload), flat(zero)) for upload in case.uploads], rel=1e-12)


@law
@given(st.floats(0.01, 10), st.floats(1.001, 100))
def test_sum_and_count_together_cost_one_gaussian(z: float, margin: float) -> None:
    """Squared sensitivities over squared noises add up: 1 / z_Δ² of the sum and (1/2)² / σ_b² of the count."""
    bound = ClippingBound(1.0, quantile=0.5, count_noise=z / 2 * margin)
    assert bound.sum_multiplier(z) > z
    assert 1 / bound.sum_multiplier(z) ** 2 + 0.25 / bound.count_noise**2 == pytest.approx(1 / z**2, rel=1e-9)


def test_the_sum_of_an_adaptive_round_carries_more_noise() -> None:
    bound = ClippingBound(2.0, quantile=0.5, rate=0.2, count_noise=1.0)
    current = State({A: torch.zeros(100, 200)})
    aggregate = run(reducer(bound, 1.0, cohort=10), current, [])
    assert aggregate.extras["noise_std"] == pytest.approx(2 / math.sqrt(0.75) / 10)
    assert float(aggregate.state[A].std()) == pytest.approx(2 / math.sqrt(0.75) / 10, rel=0.02)
    assert aggregate.extras["clip_norm"] == 2.0 != bound.value


def test_the_count_has_its_noise() -> None:
    """With no client, ``log C`` moves by −η (N(0, σ_b²) / cohort + 1/2 − γ)."""
    generator, steps = torch_generator(1, "noise"), []
    for _ in range(3000):
        bound = ClippingBound(1.0, quantile=0.7, rate=0.2, count_noise=3.0)
        bound.update(0.0, 6, generator)
        steps.append((-math.log(bound.value) / 0.2 + 0.7 - 0.5) * 6)
    assert np.mean(steps) == pytest.approx(0, abs=4 * 3 / math.sqrt(3000))
    assert np.std(steps) == pytest.approx(3, rel=4 / math.sqrt(6000))


@law
@given(st.integers(0, 20), st.integers(0, 20), st.floats(0.1, 0.9), st.sampled_from([-0.5, 0.5]))
def test_one_client_moves_the_count_by_a_half(inside: int, outside: int, quantile: float, half: float) -> None:
    """Seen from ``log C``: a step of η / (2 cohort), down for a client within the bound."""
    cohort, plain, more = 30, ClippingBound(1.0, quantile=quantile, rate=0.6), ClippingBound(1.0, quantile=quantile, rate=0.6)
    plain.update(inside / 2 - outside / 2, cohort, torch.Generator())
    more.update(inside / 2 - outside / 2 + half, cohort, torch.Generator())
    assert math.log(plain.value / more.value) == pytest.approx(0.6 * half / cohort, rel=1e-6)


@pytest.mark.parametrize("gone", [0.2, 3.0])
def test_a_client_that_is_zeroed_out_counts_as_one_that_does_not_answer(gone: float) -> None:
    current, reached = State({A: torch.zeros(1, 1)}), []
    for norms in ([0.3, 5.0, gone], [0.3, 5.0, 0.0], [0.3, 5.0]):
        bound = ClippingBound(1.0, quantile=0.5, rate=1.0, count_noise=7.0)
        run(reducer(bound, 1.0, 3), current, [State({A: torch.tensor([[norm]])}) for norm in norms])
        reached.append(-3 * math.log(bound.value))
    assert abs(reached[0] - reached[1]) == pytest.approx(0.5)
    assert reached[1] == pytest.approx(reached[2], abs=1e-12)


def followed(quantile: float, *, clients: int = 24, answering: int = 24) -> float:
    """Return the share of log-normal norms below the bound, averaged over the last 50 of 100 rounds."""
    norms = np.exp(np.random.default_rng(5).normal(size=clients))
    current = State({A: torch.zeros(1, 1), HEADS: torch.zeros(1)})
    uploads = [State({A: torch.tensor([[0.6 * size]]), HEADS: torch.tensor([0.8 * size])}) for size in norms]
    bound = ClippingBound(5.0, quantile=quantile, rate=0.3, count_noise=1e-3)
    rule, order, shares = reducer(bound, 1e-5, clients), np.random.default_rng(6), []
    for number in range(100):
        shares += [float(np.mean(norms <= bound.value))] if number >= 50 else []
        run(rule, current, [uploads[i] for i in order.choice(clients, answering, replace=False)])
    return float(np.mean(shares))


@pytest.mark.parametrize("quantile", [0.2, 0.8])
def test_the_bound_finds_its_quantile(quantile: float) -> None:
    assert followed(quantile) == pytest.approx(quantile, abs=0.03)


@pytest.mark.parametrize("quantile", [0.3, 0.6])
def test_missing_answers_push_the_quantile_away_from_a_half(quantile: float) -> None:
    assert followed(quantile, answering=12) == pytest.approx(0.5 + (quantile - 0.5) / 0.5, abs=0.05)


def test_a_fixed_bound_stays_and_draws_nothing() -> None:
    bound, generator = ClippingBound.fixed(1.5), torch_generator(1, "noise")
    before = generator.get_state()
    bound.update(10.0, 5, generator)
    assert bound == ClippingBound(1.5)
    assert torch.equal(before, generator.get_state())
    assert bound.sum_multiplier(1.1) == 1.1


@pytest.mark.parametrize("count_noise", [0.0, 0.3, 0.5])
def test_a_count_that_costs_more_than_the_round_is_refused(count_noise: float) -> None:
    bound = ClippingBound(1.0, quantile=0.5, rate=0.2, count_noise=count_noise)
    with pytest.raises(UserError, match=rf"^privacy\.count_noise={count_noise} must be above half of the noise multiplier 1, .*=flat$"):
        reducer(bound, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"value": 0.0}, "clipping norm of 0.0"),
        ({"value": math.nan}, "clipping norm of nan"),
        ({"value": math.inf}, "clipping norm of inf"),
        ({"value": 1.0, "quantile": 1.0}, "privacy.quantile=1.0"),
        ({"value": 1.0, "quantile": 0.5, "count_noise": -1.0}, "privacy.count_noise=-1.0"),
        ({"value": 1.0, "quantile": 0.5, "rate": math.nan}, "privacy.quantile_lr=nan"),
    ],
)
def test_a_bound_outside_its_range_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ClippingBound(**options)


@pytest.mark.parametrize(("z", "cohort"), [(-0.1, 5), (math.nan, 5), (math.inf, 5), (1.0, 0)])
def test_noise_and_divisor_outside_their_range_are_refused(z: float, cohort: int) -> None:
    with pytest.raises(UserError, match=r"noise_multiplier=|over 0 clients"):
        reducer(1.0, z, cohort)
