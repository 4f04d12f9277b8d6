"""Laws of a run's plan: delta, the sampling rate, ceilings that follow from the schedule, and plans left for the clients."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsb.app.private_run import drawn_rounds, plan_of, save_plans, saved_plan, server_plan_of
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import UserError
from fedsb.privacy.accounting import Entry, epsilon_of
from fedsb.privacy.plan import Plan, ServerPlan, choose_delta, make_plan, make_server_plan, sampling, unnoised_start
from fedsb.privacy.sampling import drawn_rate

BASE = load(["privacy=example", "privacy.epsilon=3", "privacy.accountant=rdp"])


def plan(*, num_examples: int = 40, rounds: tuple[int, ...] = (1, 3), exchanges: int = 0, evidence: int = 20, **privacy: Any) -> Plan:
    """Make a plan at q = 1/2 with two steps a round."""
    train = replace(BASE.train, batch_size=20, local_steps=2)
    return make_plan(
        replace(BASE.privacy, **privacy), train, client="a", num_examples=num_examples, rounds=rounds,
        exchanges=exchanges, evidence_examples=evidence,
    )  # fmt: skip


@given(st.integers(1, 10**9))
def test_delta_lies_tenfold_below_what_would_be_empty(count: int) -> None:
    delta = choose_delta(None, count, "whose")
    assert delta == min(1e-5, 0.1 / count)
    assert delta < 1 / count


@given(st.integers(1, 10**6), st.floats(0.01, 100))
def test_a_delta_that_publishes_one_of_them_is_refused(count: int, factor: float) -> None:
    given_delta = min(factor / count, 0.999)
    if given_delta < 1 / count:
        assert choose_delta(given_delta, count, "whose") == given_delta
    else:
        with pytest.raises(UserError, match=rf"is not below 1/{count} for whose; it must be"):
            choose_delta(given_delta, count, "whose")


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 4))
def test_a_round_has_the_steps_of_a_pass_without_privacy(batch: int, examples: int, epochs: int) -> None:
    train = replace(BASE.train, batch_size=batch, local_epochs=epochs, local_steps=None)
    if batch > examples:
        with pytest.raises(
            UserError, match=rf"'a' has {examples} examples, fewer than train.batch_size={batch} \(a sampling rate above 1\)"
        ):
            sampling(train, examples, "a")
    else:
        assert sampling(train, examples, "a") == (drawn_rate(batch / examples), epochs * math.ceil(examples / batch))
        assert sampling(replace(train, local_steps=7), examples, "a") == (drawn_rate(batch / examples), 7)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 12), st.sampled_from([0, 2, 4]), st.sampled_from([0.1, 0.5]), st.floats(0.3, 10))
def test_a_plan_ends_just_below_its_target(drawn: int, exchanges: int, fraction: float, target: float) -> None:
    made = plan(rounds=tuple(range(1, drawn + 1)), exchanges=exchanges, init_fraction=fraction, epsilon=target)
    assert len(made.ceiling) == exchanges + drawn
    assert 0.97 * target <= epsilon_of(made.ceiling, made.delta, "rdp") <= target
    if exchanges:
        assert epsilon_of(made.start_entries, made.delta, "rdp") <= fraction * target


def test_a_client_that_is_never_drawn_releases_its_start_alone() -> None:
    assert plan(rounds=()).ceiling == ()
    made = plan(rounds=(), exchanges=4, init_fraction=0.5)
    assert made.ceiling == made.start_entries
    assert len(made.ceiling) == 4
    assert epsilon_of(made.ceiling, made.delta, "rdp") <= 1.5


def test_a_given_noise_is_taken_for_both_and_a_small_client_gives_all_it_has() -> None:
    made = plan(epsilon=None, noise_multiplier=1.3, exchanges=2, init_fraction=0.1, evidence=100)
    assert made.training == Entry("gaussian", 0.5, 1.3, 2)
    assert made.start == Entry("gaussian", 1.0, 1.3, 1)


def test_a_target_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(UserError, match=r"^privacy.epsilon=1e-06 cannot be reached at delta=1e-05 with any noise multiplier up to 10000"):
        plan(epsilon=1e-6)


ROUNDS = {"often": (1, 2, 4), "once": (3,), "never": ()}


@pytest.mark.parametrize("exchanges", [0, 2])
def test_the_server_pays_for_whoever_is_drawn_most(exchanges: int) -> None:
    privacy = replace(BASE.privacy, epsilon=8.0, init_fraction=0.25)
    made = make_server_plan(privacy, ROUNDS, exchanges=exchanges)
    assert made.training.sampling_rate == 1  # the cohorts follow from the seed: they amplify nothing

    def spent(client: str, done: int) -> float:
        begun = (made.start,) * exchanges if made.start else ()
        return made.account([*begun, *(made.training for number in ROUNDS[client] if number <= done)], "rdp")["epsilon"]

    told = {(client, done): spent(client, done) for client in ROUNDS for done in range(5)}
    assert 0.97 * 8 <= told["often", 4] <= 8
    assert told["often", 2] == told["often", 3] < told["often", 4]
    assert told["once", 2] == told["never", 4] == told["never", 0]
    assert (told["never", 4] > 0) is bool(exchanges)
    assert told["once", 3] == told["often", 1]
    assert made.account([], "rdp")["noise-multiplier"] == made.training.noise_multiplier


def test_the_server_takes_the_number_of_clients_for_its_delta() -> None:
    assert make_server_plan(replace(BASE.privacy, epsilon=None, noise_multiplier=1.0), ROUNDS).delta == 1e-5
    with pytest.raises(UserError, match=r"^privacy.delta=0.34 is not below 1/3 for 3 clients"):
        make_server_plan(replace(BASE.privacy, delta=0.34), ROUNDS)


def small_config(*more: str) -> Config:
    return load(["privacy.accountant=rdp", "federation.num_clients=6", "federation.fraction=0.34", "federation.num_rounds=3", *more])


def test_drawn_rounds_are_those_of_the_schedule() -> None:
    drawn = drawn_rounds(small_config())
    assert set(drawn) == {f"client-{i}" for i in range(6)}
    assert [sum(number in rounds for rounds in drawn.values()) for number in (1, 2, 3)] == [2, 2, 2]
    assert any(not rounds for rounds in drawn_rounds(small_config("federation.fraction=0.01")).values())


@pytest.mark.parametrize("start", [[], ["init.kind=gradient", "privacy.init_fraction=0.3", "init.power_iterations=0"]])
def test_a_plan_comes_back_from_the_folder_as_it_was(start: list[str], tmp_path: Path) -> None:
    config = small_config("privacy=example", "privacy.epsilon=3", "train.batch_size=20", "train.local_steps=2", *start)
    plans = {name: plan_of(config, name, 40) for name in ("client-0", "a/b \u00e9")}
    assert plans["client-0"].exchanges == (2 if start else 0)
    save_plans(tmp_path / "ledgers", plans)
    assert {name: saved_plan(tmp_path / "ledgers", name) for name in plans} == plans
    assert saved_plan(tmp_path / "ledgers", "client-1") is None
    assert saved_plan(tmp_path / "elsewhere", "client-0") is None


def test_the_server_plan_of_a_configuration_has_its_schedule() -> None:
    config = small_config("privacy=client", "privacy.noise_multiplier=2", "federation.weighting=uniform")
    assert server_plan_of(config) == ServerPlan(1e-5, Entry("gaussian", 1.0, 2.0, 1), drawn_rounds(config))


@pytest.mark.parametrize(
    ("unit", "kind", "evidence", "fraction", "unnoised"),
    [
        ("example", "gradient", "clients", 0.0, True),
        ("client", "gradient", "clients", 0.0, True),
        ("example", "gradient", "clients", 0.1, False),
        ("example", "gradient", "public", 0.0, False),
        ("example", "weight_svd", "clients", 0.0, False),
        ("example", None, "clients", 0.0, False),
        ("none", "gradient", "clients", 0.0, False),
    ],
)
def test_only_gradients_of_private_data_without_noise_take_epsilon_away(
    unit: str, kind: str | None, evidence: str, fraction: float, unnoised: bool
) -> None:
    reason = unnoised_start(replace(BASE.privacy, unit=unit, init_fraction=fraction), kind, evidence)
    assert (reason is not None) is unnoised
