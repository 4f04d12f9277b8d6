"""The private mean's noise has the spread that is said, hangs on its stream alone, and nothing else that is told hangs on the data."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.errors import UserError
from fedsb.core.rng import torch_generator
from fedsb.core.state import State, subtract
from tests.strategies.privacy.private_means import HEADS, A, B, Case, cases, flat, gaussian, law, reducer, run


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


@pytest.mark.parametrize(("z", "cohort"), [(-0.1, 5), (math.nan, 5), (math.inf, 5), (1.0, 0)])
def test_noise_and_divisor_outside_their_range_are_refused(z: float, cohort: int) -> None:
    with pytest.raises(UserError, match=r"noise_multiplier=|over 0 clients"):
        reducer(1.0, z, cohort)
