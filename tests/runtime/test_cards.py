"""Ray hands each worker a card that no other has; the cards are made up, as Ray allows, and whoever computes does so on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from shlex import join

import pytest
import ray

from fedsb import client_app
from fedsb.config.compose import load
from fedsb.core.errors import UserError
from fedsb.runtime.cluster import start_ray
from fedsb.runtime.grid import simulated_nodes
from fedsb.runtime.grids import CLIENT
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.placement import Seat
from fedsb.runtime.pool import Pool, PoolSettings, close_pools
from fedsb.runtime.ray import RayGrid
from fedsb.server_app import serve
from tests.runtime.apps import cards
from tests.strategies.private_runs import small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


OBEY = "tests.runtime.apps:obey"


@pytest.fixture(scope="module", autouse=True)
def two_cards() -> Iterator[None]:
    """Start a Ray that believes in two GPUs."""
    close_pools()
    start_ray(None, 2)
    yield
    close_pools()
    gc.collect()


def seen(pool: Pool) -> list[tuple[str, str]]:
    """Return the cards of all actors of a pool."""
    pool.fill()
    while pool.starting:
        pool.came(ray.wait(pool.starting, num_returns=1)[0])
    actors = [pool.take() for _ in range(pool.size)]
    found = sorted(ray.get([actor.call.remote(cards) for actor in actors]))
    for actor in actors:
        ray.kill(actor)
    return found


def test_each_worker_has_a_card_of_its_own_and_no_more_start_than_there_are_cards() -> None:
    pool = Pool(PoolSettings(OBEY, cpus=0.25))
    assert pool.size == 2
    assert seen(pool) == [("0", "0"), ("1", "1")]
    assert pool.placement.driver == "cpu"


def test_workers_share_cards_where_asked() -> None:
    pool = Pool(PoolSettings(OBEY, workers=3, cpus=0.25, gpus=0.5))
    (first, _), (second, _), (third, _) = found = seen(pool)
    assert {first, second, third} == {"0", "1"}
    assert all(reserved == visible for reserved, visible in found)


def test_a_worker_that_reserves_none_sees_none() -> None:
    assert seen(Pool(PoolSettings(OBEY, workers=1, cpus=0.25, gpus=0.0))) == [("", "")]


def test_a_run_over_cards_has_the_bits_of_one_process(tiny_bert: Path, tmp_path: Path) -> None:
    overrides = small(tiny_bert, tmp_path, "method=fedavg_lora")
    config, run_config = load(overrides), {"overrides": join(overrides)}
    alone = serve(config, LocalGrid.simulation(client_app.app, run_config), tmp_path / "alone")
    grid = RayGrid(Pool(PoolSettings(CLIENT, cpus=0.25)), run_config, simulated_nodes())
    assert (grid.device, grid.seat) == ("cpu", Seat("cuda:0", 1))
    assert grid.remark == "2 workers with 1 of a GPU each; the server computes on cpu"
    assert serve(config, grid, tmp_path / "cards")["factors_sha256"] == alone["factors_sha256"]


def test_more_workers_than_cards_are_refused() -> None:
    """The last one here: who is refused ends Ray, made-up cards and all."""
    with pytest.raises(UserError, match=r"^3 workers with runtime\.cpus=0\.25, runtime\.gpus=1 each do not fit \(.* CPUs, 2 GPUs\); lower"):
        Pool(PoolSettings(CLIENT, workers=3, cpus=0.25))
