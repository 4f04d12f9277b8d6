"""FedAU's weights are the mean lengths of the intervals between a client's rounds, cut at K; their rounds' sum is the number of clients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsb.core.state import Name, State, WeightedSum
from strategies.server_optimizer import server_step
from strategies.weighting import WEIGHTINGS, FedAU

CLIENTS = ("a", "b", "c")
rounds = st.lists(st.sets(st.sampled_from(CLIENTS)), max_size=60)


def intervals(here: list[bool], cutoff: int) -> list[int]:
    """Cut a client's rounds into intervals that end where it took part, or after ``cutoff``."""
    found, begin = [], 0
    for number, present in enumerate(here, start=1):
        if present or number - begin == cutoff:
            found.append(number - begin)
            begin = number
    return found


@given(rounds, st.integers(1, 8))
def test_a_weight_is_the_mean_of_the_finished_intervals(history: list[set[str]], cutoff: int) -> None:
    weighting = FedAU(CLIENTS, cutoff)
    for took_part in history:
        weighting.end_round(took_part)
    for client in CLIENTS:
        found = intervals([client in took_part for took_part in history], cutoff)
        assert weighting.weight(client, 999) == pytest.approx(np.mean(found) if found else 1.0)
        assert 1.0 <= weighting.weight(client, 1) <= cutoff


@given(rounds, rounds, st.integers(1, 8))
def test_it_goes_on_from_what_it_remembers(before: list[set[str]], after: list[set[str]], cutoff: int) -> None:
    whole, first, second = (FedAU(CLIENTS, cutoff) for _ in range(3))
    for took_part in (*before, *after):
        whole.end_round(took_part)
    for took_part in before:
        first.end_round(took_part)
    second.take_up(first.carried())
    for took_part in after:
        second.end_round(took_part)
    assert second.carried() == whole.carried()


def test_the_weights_learn_how_rarely_a_client_comes() -> None:
    """With p of 0.9, 0.5 and 0.1 the weights go to 1/p, and the expected sum over a round's clients to their number, 3."""
    chances = dict(zip(CLIENTS, (0.9, 0.5, 0.1), strict=True))
    generator = np.random.default_rng(0)
    weighting, sums = FedAU(CLIENTS, 200), []
    for number in range(4000):
        here = {client for client, chance in chances.items() if generator.random() < chance}
        if number >= 1000:
            sums.append(sum(weighting.weight(client, 1) for client in here))
        weighting.end_round(here)
    for client, chance in chances.items():
        assert weighting.weight(client, 1) == pytest.approx(1 / chance, rel=0.1)
    assert np.mean(sums) == pytest.approx(3, rel=0.1)


@given(st.integers(0, 999))
def test_the_next_state_is_the_paper_s(seed: int) -> None:
    """current + (1/N) Σ ω_n (x_n − current) over the clients that came, whatever the reducer's mean was normalised by."""
    draw = np.random.default_rng(seed)
    weighting, reducer, name = FedAU(CLIENTS, 5), WeightedSum(), Name("m", "R")
    for _ in range(int(draw.integers(0, 9))):
        weighting.end_round([client for client in CLIENTS if draw.random() < 0.4])
    current, *uploads = (State({name: torch.tensor(draw.normal(size=4))}) for _ in range(3))
    wanted, total = current[name].clone(), 0.0
    for client, upload in zip(CLIENTS, uploads, strict=False):
        weight = weighting.weight(client, 7)
        reducer.add(upload, weight)
        total += weight
        wanted += weight / len(CLIENTS) * (upload[name] - current[name])
    found = server_step(current, reducer.mean(), weighting.share(total), None)
    torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_fixed_ones_follow_the_examples_or_nothing() -> None:
    assert WEIGHTINGS["examples"](CLIENTS, 1).weight("a", 30) == 30.0
    assert WEIGHTINGS["uniform"](CLIENTS, 1).weight("a", 30) == 1.0
