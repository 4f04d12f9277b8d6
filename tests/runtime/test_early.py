"""What is begun before anything is composed: only what no other argument could turn elsewhere."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
import ray

from fedsb.core.errors import UserError
from fedsb.runtime import cluster
from fedsb.runtime.early import EARLY, QUIET, begin
from fedsb.runtime.pool import close_pools


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setitem(EARLY, "runtime=ray", lambda: found.append("ray"))  # type: ignore[arg-type]
    for name in QUIET:
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.mark.parametrize(
    ("more", "starts"),
    [
        ((), True),
        (("-m", "seed=0,1"), True),
        (("runtime.address=auto",), False),
        (("++runtime.address=10.0.0.1:6379",), False),
        (("resume=outputs/x",), False),
        (("+hydra/launcher=joblib",), False),
    ],
)
def test_ray_begins_here_only_where_nothing_leads_elsewhere(more: tuple[str, ...], starts: bool, begun: list[str]) -> None:
    begin(["method=fed_sb", "runtime=ray", *more])
    assert begun == ["ray"] * starts
    # Before Ray's processes are there, which take it over.
    assert {name: os.environ[name] for name in QUIET} == QUIET


def test_nothing_begins_for_another_runtime(begun: list[str]) -> None:
    begin(["method=fed_sb", "runtime=local"])
    assert begun == []


def starting() -> int:
    """Return how many threads have begun to start Ray: they live as long as the process."""
    return [thread.name for thread in threading.enumerate()].count("ray-start")


@pytest.fixture
def left_alone() -> Iterator[None]:
    close_pools()
    yield
    with suppress(Exception):
        ray.shutdown()
    gc.collect()  # here, where what Ray leaves open is no error


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cluster_that_is_named_is_joined_whatever_was_begun_here(left_alone: None) -> None:
    """A run that goes on with one which had an address must not quietly compute on this machine."""
    before = starting()
    cluster.start_early()
    with pytest.raises(UserError, match=r"^no Ray cluster at runtime\.address=127\.0\.0\.1:1 "):
        cluster.start_placed("127.0.0.1:1", "cpu", None, 1)
    assert not ray.is_initialized()
    assert starting() <= before + 1
