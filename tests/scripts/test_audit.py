"""The audit's bounds and tests on mechanisms whose privacy is known, and the audit itself on the real code and on what it breaks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from fedsb.core.rng import numpy_generator
from fedsb.privacy.accounting import Entry, epsilon_of
from scripts.audit.bounds import any_mechanism, epsilon_of_shift, from_guesses, gaussian, rate_above
from scripts.audit.exact import Bits, Values, apart, draw_tests, largest_ratio, least, noise_tests

ROOT = Path(__file__).resolve().parents[2]
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


SIZES = {"adapter": 64, "bias": 5, "head": 300}


def noise(draw: np.random.Generator, releases: int) -> Values:
    return draw.normal(size=(releases, sum(SIZES.values())))


def rejected(found: dict[str, float], level: float = 1e-3) -> bool:
    return least(list(found.values())) < level


def test_true_noise_is_not_refuted_more_often_than_stated() -> None:
    draw, repeats = numpy_generator(0, "true noise"), 150
    found = [noise_tests(list(noise(draw, 12)), SIZES, (1, 2, 4)) for _ in range(repeats)]
    assert np.mean([rejected(each, ALPHA) for each in found]) <= too_often(repeats)
    for name in found[0]:
        assert np.mean([each[name] < ALPHA for each in found]) <= too_often(repeats), name


def half(values: Values) -> Values:
    return 0.5 * values


def bare_bias(values: Values) -> Values:
    return np.concatenate([values[:, :64], 0 * values[:, 64:69], values[:, 69:]], axis=1)


def more(values: Values) -> Values:
    return 1.2 * values


def one_step_bare(values: Values) -> Values:
    return values * (np.arange(len(values)) != 3)[:, None]


def again(values: Values) -> Values:
    return np.repeat(values[::2], 2, axis=0)


def negated(values: Values) -> Values:
    return np.stack([sign * row for row in values[::2] for sign in (1, -1)])


def one_draw(values: Values) -> Values:
    return np.concatenate([values[:, :64], values[:, :5], values[:, 69:]], axis=1)


def uniform(values: Values) -> Values:
    return math.sqrt(12) * (norm.cdf(values) - 0.5)


@pytest.mark.parametrize("broken", [half, bare_bias, more, one_step_bare, again, negated, one_draw, uniform])
def test_every_fault_of_the_noise_is_refuted(broken: Callable[[Values], Values]) -> None:
    values = broken(noise(numpy_generator(0, "noise"), 24))
    assert rejected(noise_tests(list(values), SIZES, (1, 2)))


def test_the_noise_of_each_tensor_alone_is_refuted_when_halved() -> None:
    start = 0
    for name, size in SIZES.items():
        values = noise(numpy_generator(0, name), 40)
        values[:, start : start + size] *= 0.5
        found, start = noise_tests(list(values), SIZES, ()), start + size
        assert min(found, key=lambda test: found[test]) == f"size of the noise, {name}"
        assert rejected(found)


def coins(draw: np.random.Generator, steps: int = 60, examples: int = 32, rate: float = 0.25) -> Bits:
    return draw.random((steps, examples)) < rate


def test_true_samples_are_not_refuted_more_often_than_stated() -> None:
    draw, repeats = numpy_generator(0, "true samples"), 150
    found = [draw_tests(coins(draw), 0.25, (1, 2, 4)) for _ in range(repeats)]
    for name in found[0]:
        assert np.mean([each[name] < ALPHA for each in found]) <= too_often(repeats), name


def everyone(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.ones_like(drawn)


def fixed_size(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.stack([np.isin(np.arange(32), draw.permutation(32)[:8]) for _ in drawn])


def epochs(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.concatenate([np.isin(np.arange(32), part)[None] for _ in range(15) for part in np.split(draw.permutation(32), 4)])


def one_for_four(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.repeat(drawn[::4], 4, axis=0)


def of_another_round(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.tile(drawn[:4], (15, 1))


def neighbours(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.repeat(drawn[:, ::2], 2, axis=1)


def one_coin(drawn: Bits, draw: np.random.Generator) -> Bits:
    return np.repeat(drawn[:, :1], 32, axis=1)


def favoured(drawn: Bits, draw: np.random.Generator) -> Bits:
    return drawn | (np.arange(32) == 7)


@pytest.mark.parametrize("wrong", [everyone, fixed_size, epochs, one_for_four, of_another_round, neighbours, one_coin, favoured])
def test_every_wrong_sampler_is_refuted(wrong: Callable[[Bits, np.random.Generator], Bits]) -> None:
    draw = numpy_generator(0, "wrong samples")
    assert rejected(draw_tests(wrong(coins(draw), draw), 0.25, (1, 2, 4)), 1e-6)


def test_the_largest_ratio_covers_the_true_one() -> None:
    draw, repeats = numpy_generator(0, "ratio"), 400
    assert np.mean([largest_ratio(0.7 * draw.normal(size=200), ALPHA) < 0.7 for _ in range(repeats)]) <= too_often(repeats)


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_pairs_are_so_far_apart_and_share_nothing(lag: int) -> None:
    first, second = apart(np.arange(23)[:, None], lag)
    assert (second - first == lag).all()
    assert len({*first.ravel(), *second.ravel()}) == 2 * len(first) > 0


def audited(out: Path, *rows: str) -> dict[str, Any]:
    """Run the quick audit of the rows whose names hold one of these; return its tables."""
    command = [sys.executable, str(ROOT / "scripts/audit/audit_privacy.py"), "--quick", "--out", str(out), "--only", *rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert all(row["verdict"].startswith("PASS") and row["found"]["parts"] <= row["found"]["claim"] for row in made["rows"])
    assert all(all(line["by"]) for line in made["faults"])
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_audit_passes_the_real_code_and_catches_what_is_broken(tmp_path: Path) -> None:
    """Rows that are over in seconds, at the server and at a client with self-checks; the others are the same code, dearer."""
    made = audited(tmp_path / "audit.json", "privacy=client", "constant time", "two lengths, flat")
    server = {"privacy=client", "privacy=client, adaptive", "privacy=client, start"}
    assert {row["row"] for row in made["rows"]} == {*server, "constant time", "two lengths, flat"}
    assert sum(line["row"] in server for line in made["faults"]) == 7
    assert [line["fault"] for line in made["faults"] if line["row"] == "constant time"] == ["half the noise"]
    by_length = [line["fault"] for line in made["faults"] if line["row"] == "two lengths, flat"]
    assert by_length == ["half the noise", "padding to the longest text"]


PLANTED = """
from audit_privacy import evaluation_rows, faults, other_rows, subject, text_rows, training_rows
tiny = subject(0)
rows = {row.name: row for row in [*training_rows(tiny), *other_rows(tiny), *evaluation_rows(tiny), *text_rows(0)]}
for fault in faults(list(rows.values())):
    for name in fault.rows:
        for plant in fault.plants:
            with plant(rows[name]):
                print(fault.name, name)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fault_is_planted_where_the_code_is() -> None:
    """What it replaces is named in words, and may have moved since."""
    command = [sys.executable, "-c", PLANTED]
    done = subprocess.run(
        command, cwd=ROOT / "scripts" / "audit", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 60
