"""Weights and bounds of a secure sum that a client takes, and that one round has one sum."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.secure.session import SecureError
from tests.app.test_secured import CONFIG, FOUR, RUN, Clients

FEDAU = load([*RUN, "federation.weighting=fedau", "federation.cutoff=5"])


@pytest.mark.parametrize(
    ("config", "told"),
    [(FEDAU, {"weights": (2.0, 1.0, 1.0, 1.0)}), (CONFIG, {"bound": 0.06}), (CONFIG, {"config": load([*RUN, "seed=1"])})],
    ids=["with other weights", "rounded otherwise", "by other settings"],
)
def test_a_second_sum_of_the_same_is_refused(config: Config, told: dict[str, Any], tmp_path: Path) -> None:
    """By as many sums as there are clients, each weighted, rounded or trained otherwise, a server would know all summands."""
    first = Clients(tmp_path, config=config, weights=(1.0,) * 4 if config is FEDAU else (20.0,) * 4).begin()
    first.confirm(*FOUR)
    first.answer("client-0", FOUR)
    again = Clients(tmp_path, **{"config": config, "weights": first.weights, **told}).begin()
    again.confirm(*FOUR)
    with pytest.raises(SecureError, match="for another sum of round 1 were given before"):
        again.answer("client-0", FOUR)


@pytest.mark.parametrize(
    ("overrides", "told", "said"),
    [
        ([], {"weights": (20.0, 21.0, 20.0, 20.0)}, ""),
        ([], {"weights": (21.0, 20.0, 20.0, 20.0)}, "another weight than 20, which is its own"),
        (["federation.weighting=fedau"], {"weights": (1.0, 0.0, 1.0, 1.0)}, "gives 'client-1' a weight outside [1, "),
        (["federation.weighting=fedau"], {"weights": (1e9, 1.0, 1.0, 1.0)}, "gives 'client-0' a weight outside [1, "),
        ([], {"bound": 0.005}, "gives 0.005 as the bound of a change, and this client's is "),
        ([], {"bound": 100.0}, "as the bound of a change"),
        ([], {"bound": float("inf")}, "as the bound of a change"),
        ([], {"bound": float("nan")}, "as the bound of a change"),
        ([], {"bound": 0.0}, "as the bound of a change"),
        ([], {"bound": -1.0}, "as the bound of a change"),
        (["federation.secure_bound=0.01"], {"bound": 0.01}, ""),
        (["federation.secure_bound=0.01"], {"bound": 0.02}, "gives 0.02 as the bound of a change, and this client's is 0.01"),
    ],
)
def test_weights_and_bounds_that_a_run_cannot_have_are_refused(
    overrides: list[str], told: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """A bound too small cuts what it should not, one too large leaves of a sum the largest summand."""
    clients = Clients(tmp_path, config=load([*RUN, *overrides]), **told)
    clients.advertise()
    for client in FOUR:
        clients.give(client)
    with pytest.raises(SecureError, match=re.escape(said)) if said else nullcontext():
        clients.mask("client-0")
