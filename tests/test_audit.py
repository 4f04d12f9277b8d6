"""The audit's bounds on mechanisms whose privacy is known, and the audit itself on the real code and on what it breaks."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsb.privacy.accounting import Entry, epsilon_of
from fedsb.rng import numpy_generator
from scripts.audit_bounds import any_mechanism, epsilon_of_shift, from_guesses, gaussian, rate_above

ROOT = Path(__file__).resolve().parent.parent
DELTA, ALPHA = 1e-5, 0.05


def too_often(repeats: int) -> float:
    """Four standard errors above alpha: an honest bound is wrong more often once in 30,000 seeds."""
    return ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / repeats)


@pytest.mark.parametrize(("shift", "reach"), [(0.3, 0.3), (0.87, 0.7), (2.0, 0.8)])
def test_the_gaussian_bound_covers_and_is_not_vacuous(shift: float, reach: float) -> None:
    draw, truth, repeats = numpy_generator(0, "gaussian", str(shift)), epsilon_of_shift(shift, DELTA), 400
    found = []
    for _ in range(repeats):
        bits = draw.random(2000) < 0.5
        found.append(gaussian(draw.normal(size=2000) + shift * bits, bits, shift / 2, delta=DELTA, alpha=ALPHA))
    assert np.mean(np.array(found) > truth) <= too_often(repeats)
    assert np.median(found) > reach * truth


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_the_general_bound_covers_where_it_is_tightest(epsilon: float) -> None:
    """Randomised response: no mechanism with this epsilon lets more be guessed."""
    draw, repeats = numpy_generator(0, "response", str(epsilon)), 200
    found = []
    for _ in range(repeats):
        bits = draw.random(1000) < 0.5
        said = bits ^ (draw.random(1000) > 1 / (1 + math.exp(-epsilon)))
        found.append(any_mechanism(said + 0.1 * draw.random(1000), bits, delta=0.0, alpha=ALPHA))
    assert np.mean(np.array(found) > epsilon) <= too_often(repeats)
    assert np.median(found) > 0.5 * epsilon


def test_the_general_bound_covers_where_canaries_depend_on_each_other() -> None:
    """Noisy sums of three canaries each, whose members are guessed alike: one canary moves a sum by three standard deviations."""
    draw, truth, repeats = numpy_generator(0, "sums"), epsilon_of_shift(3.0, DELTA), 100
    found = []
    for _ in range(repeats):
        bits = draw.random(1500) < 0.5
        sums = 3.0 * bits.reshape(-1, 3).sum(1) + draw.normal(size=500)
        found.append(any_mechanism(np.repeat(sums, 3), bits, delta=DELTA, alpha=ALPHA))
    assert np.mean(np.array(found) > truth) <= too_often(repeats)
    assert np.median(found) > 0.1 * truth


@pytest.mark.parametrize("together", [False, True])
def test_delta_alone_is_not_taken_for_epsilon(together: bool) -> None:
    """(0, δ): a canary is shown with probability δ, each by itself or all at once. Without δ the former refutes epsilon 0."""
    draw, delta, repeats = numpy_generator(0, "shown"), 0.02, 200
    with_delta, without = [], []
    for _ in range(repeats):
        bits = draw.random(2000) < 0.5
        shown = draw.random(1 if together else 2000) < delta
        scores = draw.random(2000) + np.where(shown, np.where(bits, 9.0, -9.0), 0.0)
        with_delta.append(any_mechanism(scores, bits, delta=delta, alpha=ALPHA))
        without.append(any_mechanism(scores, bits, delta=0.0, alpha=ALPHA))
    assert np.mean(np.array(with_delta) > 0) <= too_often(repeats)
    assert together or np.median(without) > 0.5


@pytest.mark.parametrize("guesses", [10, 300])
def test_guesses_that_are_all_right_give_the_bound_of_a_binomial(guesses: int) -> None:
    """Randomised response is right every time with probability qⁿ: alpha where the bound lies (Steinke et al. 2023)."""
    likely = ALPHA ** (1 / guesses)
    assert from_guesses(guesses, guesses, guesses, delta=0.0, alpha=ALPHA) == pytest.approx(math.log(likely / (1 - likely)), abs=0.02)
    assert from_guesses(guesses, guesses, guesses // 2, delta=0.0, alpha=ALPHA) == 0.0


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0])
def test_the_epsilon_of_a_shift_is_the_accountants(shift: float) -> None:
    exact = epsilon_of_shift(shift, DELTA)
    assert exact <= epsilon_of([Entry("gaussian", 1.0, 1 / shift, 1)], DELTA, "pld") <= 1.01 * exact
    assert epsilon_of_shift(-1.0, DELTA) == epsilon_of_shift(1e-7, DELTA) == 0.0


def test_rates_are_those_of_clopper_and_pearson() -> None:
    assert rate_above(0, 100, ALPHA) == pytest.approx(1 - ALPHA ** (1 / 100))
    assert rate_above(100, 100, ALPHA) == 1.0


@pytest.mark.slow
def test_the_audit_passes_the_real_code_and_catches_what_is_broken(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/audit_privacy.py"), "--quick", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    broken = {name for name, row in rows.items() if row["broken"]}
    assert broken == {"no noise", "no clipping", "head left out of the clipping"}
    assert all(rows[name]["bound"] > rows[name]["claim"] for name in broken)
    assert all(row["claim"] / 5 < row["bound"] <= row["claim"] for name, row in rows.items() if name not in broken)
    assert len(rows) == 5
    assert all(row["confidence"] >= 0.95 for row in rows.values())
