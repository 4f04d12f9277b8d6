"""Laws of the accountants: three of them and an exact formula agree, and calibration meets its target from below."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr

from fedsb.core.errors import UserError
from fedsb.privacy.accounting import ACCOUNTANTS, PRV_ERROR, Entry, calibrate, epsilon_of
from fedsb.privacy.entries import LARGEST_MULTIPLIER, MOST_STEPS, SMALLEST_MULTIPLIER, UNNOISED, read_entry
from fedsb.privacy.sampling import GRID, SMALLEST_RATE, drawn_rate

# Sampling rate, noise, steps, delta: fine-tuning with epsilon between 0.5 and 10. Below that RDP's excess has no bound: its conversion
# leaves a constant over the order, so the ratio is claimed for this regime and no other.
REALISTIC = [
    (0.01, 0.6, 200, 1e-5),
    (0.01, 1.0, 2000, 1e-5),
    (0.05, 0.9, 60, 1e-5),
    (16 / 150, 1.2, 30, 1e-4),
    (0.1, 6.0, 1000, 1e-6),
    (0.3, 2.0, 10, 1e-5),
    (1.0, 10.0, 100, 1e-6),
    (1.0, 4.0, 1, 1e-5),
]


def gaussian(q: float, noise: float, steps: int) -> Entry:
    return Entry("gaussian", q, noise, steps)


def exact_gaussian(noise: float, delta: float) -> float:
    """Epsilon of one Gaussian release without sampling: Balle and Wang 2018 (arXiv 1805.06530), theorem 8."""

    def excess(epsilon: float) -> float:
        near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
        return math.exp(log_ndtr(near)) - math.exp(epsilon + log_ndtr(far)) - delta

    return float(brentq(excess, 0.0, 500.0, xtol=1e-12))


@pytest.mark.parametrize(("q", "noise", "steps", "delta"), REALISTIC)
def test_prv_and_pld_agree_and_rdp_lies_a_little_above(q: float, noise: float, steps: int, delta: float) -> None:
    prv, pld, rdp = (epsilon_of([gaussian(q, noise, steps)], delta, name) for name in ("prv", "pld", "rdp"))
    assert 0.5 < prv < 10
    # PRV's bound holds its stated error twice at most: once in the estimate and once added to it.
    assert pld * 0.998 <= prv <= pld * 1.002 + 2 * PRV_ERROR * rdp
    assert prv < rdp < 1.3 * prv


@pytest.mark.parametrize("steps", [1, 50])
@pytest.mark.parametrize(("noise", "delta"), [(0.6, 1e-5), (2.0, 1e-6), (20.0, 1e-4)])
def test_without_sampling_epsilon_is_that_of_the_exact_formula(noise: float, delta: float, steps: int) -> None:
    exact = exact_gaussian(noise, delta)
    entries = [gaussian(1.0, noise * math.sqrt(steps), steps)]
    for name in ACCOUNTANTS:
        assert epsilon_of(entries, delta, name) >= exact * (1 - 1e-6)
    assert epsilon_of(entries, delta, "pld") == pytest.approx(exact, rel=1e-3)
    assert epsilon_of(entries, delta, "prv") == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("name", sorted(ACCOUNTANTS))
def test_neither_order_nor_splitting_changes_an_epsilon(name: str) -> None:
    one, other, last = gaussian(0.05, 1.0, 20), gaussian(0.1, 1.5, 10), gaussian(1.0, 8.0, 1)
    epsilon = epsilon_of([one, other, last], 1e-5, name)
    split = [last, gaussian(0.05, 1.0, 13), other, gaussian(0.3, 1.0, 0), gaussian(0.05, 1.0, 7)]
    assert epsilon_of(split, 1e-5, name) == epsilon
    assert max(epsilon_of([entry], 1e-5, name) for entry in (one, other, last)) < epsilon


def test_two_samples_cost_less_than_one_sample_used_twice() -> None:
    """Two exchanges of a start at q = 0.1, noise 1: with samples of their own, or with one sample for both (1/σ² adds up to 2)."""
    for name in ("prv", "pld"):
        assert epsilon_of([gaussian(0.1, 1.0, 1)] * 2, 1e-4, name) == pytest.approx(1.40, abs=0.02)
        assert epsilon_of([gaussian(0.1, math.sqrt(0.5), 1)], 1e-4, name) == pytest.approx(2.62, abs=0.03)


@pytest.mark.parametrize("name", sorted(ACCOUNTANTS))
def test_nothing_released_costs_nothing_and_no_noise_costs_everything(name: str) -> None:
    assert epsilon_of([], 1e-5, name) == epsilon_of([gaussian(0.1, 0.0, 0)], 1e-5, name) == 0.0
    assert epsilon_of([gaussian(0.1, 0.0, 1), gaussian(0.1, 1.0, 10)], 1e-5, name) == math.inf


@pytest.mark.parametrize("name", sorted(ACCOUNTANTS))
@pytest.mark.parametrize(
    ("q", "noise", "steps"), [(0.1, 1e-3, 1), (1.0, 0.6, 2000), (0.01, 0.05, 100), (0.01, 100.0, 1), (1.0, 1e-6, 10**6)]
)
def test_extremes_neither_crash_nor_hang(name: str, q: float, noise: float, steps: int) -> None:
    begun = time.process_time()
    epsilon = epsilon_of([gaussian(q, noise, steps)], 1e-5, name)
    assert epsilon >= 0
    assert not math.isnan(epsilon)
    assert noise > 1 or epsilon > 50
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("mechanism", "q", "noise", "steps"),
    [
        ("laplace", 0.1, 1.0, 1),
        *(("gaussian", q, 1.0, 1) for q in (0.0, -0.1, 1.1, math.nan)),
        *(("gaussian", 0.1, noise, 1) for noise in (-1.0, math.nan, math.inf)),
        *(("gaussian", 0.1, noise, 1) for noise in (9e-7, 1.1e6)),
        *(("gaussian", 0.1, 1.0, steps) for steps in (-1, 1.5, 10**9 + 1)),
    ],
)
def test_what_is_no_release_is_refused(mechanism: str, q: float, noise: float, steps: int) -> None:
    with pytest.raises(ValueError, match=r"mechanism is|sampling rate is|noise multiplier is|steps are"):
        Entry(mechanism, q, noise, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta is"):
        epsilon_of([gaussian(0.1, 1.0, 1)], delta)


def test_an_unknown_accountant_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown accountant 'pvr' \(did you mean 'prv'\?\)"):
        epsilon_of([gaussian(0.1, 1.0, 1)], 1e-5, "pvr")


rates = st.sampled_from([0.01, 0.05, 1.0])
befores = st.lists(st.builds(gaussian, rates, st.floats(8.0, 40.0), st.integers(1, 3)), max_size=1)
targets = st.floats(0.5, 10.0)


def held(target: float, delta: float, releases: list[tuple[float, int]], before: list[Entry], name: str) -> None:
    noise = calibrate(target, delta, releases, before=before, accountant=name)
    epsilon = epsilon_of([*before, *(gaussian(q, noise, steps) for q, steps in releases)], delta, name)
    assert 0.99 * target <= epsilon <= target


@settings(max_examples=3, deadline=None, derandomize=True)
@given(targets, st.sampled_from([1e-4, 1e-5, 1e-6]), st.lists(st.tuples(rates, st.integers(1, 300)), min_size=1, max_size=2), befores)
def test_calibration_meets_its_target_from_below(
    target: float, delta: float, releases: list[tuple[float, int]], before: list[Entry]
) -> None:
    """Of what the target allows, a part may be spent already."""
    assume(epsilon_of(before, delta, "rdp") < 0.8 * target)
    held(target, delta, releases, before, "rdp")


@pytest.mark.parametrize(
    ("name", "target", "delta", "releases", "before"),
    [
        ("prv", 3.0, 1e-5, [(0.05, 60)], [gaussian(1.0, 9.0, 2)]),
        ("prv", 0.7, 1e-6, [(1.0, 40)], []),
        ("pld", 8.0, 1e-4, [(1.0, 20)], [gaussian(1.0, 6.0, 1)]),
    ],
)
def test_calibration_with_the_tight_accountants(
    name: str, target: float, delta: float, releases: list[tuple[float, int]], before: list[Entry]
) -> None:
    held(target, delta, releases, before, name)


def test_calibration_is_the_smallest_noise_and_the_same_every_time() -> None:
    noise = calibrate(2.0, 1e-5, [(1.0, 5)])
    assert calibrate(2.0, 1e-5, ((1.0, 5),), before=()) == noise
    assert epsilon_of([gaussian(1.0, noise * 0.99, 5)], 1e-5) > 2.0
    # What was spent before leaves less.
    assert calibrate(2.0, 1e-5, [(1.0, 5)], before=[gaussian(1.0, 8.0, 1)]) > noise


def test_a_target_out_of_reach_is_said_in_one_line() -> None:
    spent = [gaussian(1.0, 1.0, 1)]
    with pytest.raises(UserError, match=r"privacy\.epsilon=2 cannot be reached .* as 4\.\d+ was spent before") as error:
        calibrate(2.0, 1e-5, [(1.0, 1)], before=spent)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"privacy\.epsilon=1e-06 cannot be reached"):
        calibrate(1e-6, 1e-5, [(1.0, 1)])


@pytest.mark.parametrize(
    ("target", "releases"), [(0.0, [(0.1, 1)]), (-1.0, [(0.1, 1)]), (math.inf, [(0.1, 1)]), (1.0, []), (1.0, [(0.1, 0)])]
)
def test_calibration_of_nothing_is_refused(target: float, releases: list[tuple[float, int]]) -> None:
    with pytest.raises(ValueError, match=r"must be positive and finite|nothing to release"):
        calibrate(target, 1e-5, releases)


def edges(least: float, most: float) -> st.SearchStrategy[float]:
    """Draw from a range by its logarithm, its ends and whole powers of ten among the first."""
    logs = st.floats(math.log(least), math.log(most)).map(lambda x: min(max(math.exp(x), least), most))
    return st.one_of(st.sampled_from([least, most]), logs)


held_entries = st.builds(
    gaussian,
    st.one_of(edges(SMALLEST_RATE, 1.0), st.sampled_from([0.5, 0.47])),
    edges(SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER),
    edges(1, MOST_STEPS).map(int),
)


def check_an_epsilon(name: str, entries: list[Entry], delta: float) -> None:
    epsilon = epsilon_of(entries, delta, name)
    assert epsilon >= 0
    # One release without sampling is a lower bound of any list that holds it.
    least = min((entry.noise_multiplier for entry in entries if entry.sampling_rate == 1), default=math.inf)
    assert least > 10 or epsilon >= 0.99 * exact_gaussian(max(least, 0.05), delta)


whatever = st.lists(held_entries, min_size=1, max_size=3), st.sampled_from([1e-9, 1e-5, 1e-2])


@settings(max_examples=30, deadline=None)
@given(*whatever)
def test_whatever_a_ledger_can_hold_has_an_epsilon(entries: list[Entry], delta: float) -> None:
    check_an_epsilon("rdp", entries, delta)


@pytest.mark.parametrize("name", ["prv", "pld"])
@settings(max_examples=4, deadline=None)
@given(*whatever)
def test_whatever_a_ledger_can_hold_has_a_tight_epsilon(name: str, entries: list[Entry], delta: float) -> None:
    check_an_epsilon(name, entries, delta)


def test_an_accountant_that_fails_leaves_it_to_another_and_one_that_finds_no_number_to_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(entries: object, delta: float) -> float:
        raise ZeroDivisionError

    entries = [gaussian(0.123, 3.21, 4)]
    monkeypatch.setitem(ACCOUNTANTS, "prv", fails)
    assert epsilon_of(entries, 1e-5, "prv") == epsilon_of(entries, 1e-5, "rdp") > 0
    monkeypatch.setitem(ACCOUNTANTS, "pld", lambda entries, delta: math.nan)
    monkeypatch.setitem(ACCOUNTANTS, "rdp", lambda entries, delta: math.nan)
    assert epsilon_of([gaussian(0.123, 3.22, 4)], 1e-5, "pld") == math.inf


def test_more_steps_than_can_be_accounted_for_protect_nothing() -> None:
    assert epsilon_of([gaussian(0.1, 10.0, MOST_STEPS)] * 2, 1e-5, "rdp") == math.inf


@given(st.floats(2**-30, 1.0))
def test_the_rate_that_is_drawn_is_the_next_on_the_grid(rate: float) -> None:
    found = drawn_rate(rate)
    assert found >= rate
    assert found - rate < SMALLEST_RATE
    assert float(torch.tensor(found, dtype=torch.float32)) == found == drawn_rate(found)


def test_the_sampler_draws_at_the_rate_that_is_accounted_for() -> None:
    """Every uniform that float32 has on the grid around q, held against q by Opacus' own comparison."""
    for rate in (1.6e-7, 1.6e-5, 10 / 60_001, 1 / 3, 0.7):
        accounted = drawn_rate(rate)
        uniforms = torch.arange(max(0, int(rate * GRID) - 50), int(rate * GRID) + 50, dtype=torch.float64) / GRID
        drawn = int((uniforms.float() < accounted).sum()) + max(0, int(rate * GRID) - 50)
        assert drawn / GRID == accounted
    draws = torch.rand(10**6, generator=torch.Generator().manual_seed(0)).double() * GRID
    assert torch.equal(draws, draws.round())


@settings(max_examples=50)
@given(st.floats(5e-324, 1.0), st.floats(0, 1e300), st.integers(0, 10**12))
def test_an_entry_of_an_earlier_version_is_what_it_was_or_protects_nothing(rate: float, noise: float, steps: int) -> None:
    entry = read_entry({"mechanism": "gaussian", "sampling_rate": rate, "noise_multiplier": noise, "steps": steps})
    inside = (noise == 0 or SMALLEST_MULTIPLIER <= noise <= LARGEST_MULTIPLIER) and steps <= MOST_STEPS
    assert entry == (gaussian(drawn_rate(rate), noise, steps) if inside else UNNOISED)
