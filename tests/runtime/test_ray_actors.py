"""Ray's actors answer every message once: what dies is replaced and asked again, what hangs is ended, and nothing else is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import run_log
from fedsb.core.state import Name, State
from fedsb.runtime.grid import simulated_nodes
from fedsb.runtime.pool import Pool, PoolSettings, pool_for
from fedsb.runtime.ray import AHEAD, RayGrid
from fedsb.wire.arrays import decode_arrays, encode_arrays
from fedsb.wire.byte_counts import overhead_bytes
from tests.runtime.apps import Holder
from tests.runtime.pools import OBEYING, RAY, processes, ready

pytestmark = RAY


def obedient(**options: Any) -> RayGrid:
    """Return a grid of two actors that do what they are told, and are both ready to."""
    return RayGrid(ready(pool_for(OBEYING)), {"overrides": "as given"}, simulated_nodes(3), **options)


def orders(*deeds: tuple[str, object], arrays: ArrayRecord | None = None, kind: str = "train") -> list[Message]:
    """Return a message a deed, in order, to nodes 1, 2, 3 in turn."""
    more = {} if arrays is None else {"arrays": arrays}
    contents = [
        RecordDict({"config": ConfigRecord({"do": do, "with": str(what), "number": i, "client": f"client-{i}"}), **more})
        for i, (do, what) in enumerate(deeds)
    ]
    return [Message(content, i % 3 + 1, kind) for i, content in enumerate(contents)]


def numbers(replies: Sequence[Message]) -> list[int]:
    return [int(reply.content["metrics"]["number"]) for reply in replies if reply.has_content()]  # type: ignore[index, arg-type]


def reasons(replies: Sequence[Message]) -> list[str]:
    return [str(reply.error.reason) for reply in replies if reply.has_error()]


def test_every_message_is_answered_once_by_one_of_the_actors() -> None:
    arrays = ArrayRecord([np.zeros(1000, np.float32)])
    grid = obedient()
    messages = orders(*[("answer", "")] * 40, arrays=arrays)
    replies = grid.send_and_receive(messages)
    assert sorted(numbers(replies)) == list(range(40))
    assert {reply.metadata.reply_to_message_id for reply in replies} == {message.metadata.message_id for message in messages}
    found = [reply.content["metrics"] for reply in replies]
    assert len({metrics["pid"] for metrics in found}) == 2
    assert os.getpid() not in {metrics["pid"] for metrics in found}
    assert all(metrics["node"] == metrics["number"] % 3 + 1 and metrics["bytes"] >= 4000 for metrics in found)
    assert {str(reply.content["config"]["overrides"]) for reply in replies} == {"as given"}


@pytest.mark.parametrize(("level", "stack"), [("info", 1), ("debug", 1), ("info", 2)])
def test_what_workers_log_stands_in_the_runs_log(level: str, stack: int, tmp_path: Path) -> None:
    with run_log(tmp_path / "run.log", level):
        obedient(stack=stack).send_and_receive(orders(("log", "first"), ("log", "second"), ("answer", "")))
    told = (tmp_path / "run.log").read_text(encoding="utf-8")
    for number, text in enumerate(("first", "second")):
        who = "client-0, client-1" if stack == 2 else f"client-{number}"
        assert f" WARNING {who}: {text} …\nTraceback" in told
        assert told.count(f"ValueError: {text}") == 1
        assert (f" DEBUG {who}: a detail of {text}\n" in told) is (level == "debug")


def test_arrays_lie_in_shared_memory_and_read_as_before() -> None:
    obedient()
    sent = encode_arrays(State({Name("m", "R"): torch.randn(300, 300)}))
    came = ray.get(ray.put(sent))
    assert isinstance(came["trained"].data, memoryview)
    assert came["trained"].data.readonly
    assert bytes(came["trained"].data) == sent["trained"].data
    assert torch.equal(decode_arrays(came)["trained"], decode_arrays(sent)["trained"])
    assert overhead_bytes(RecordDict({"arrays": came})) == overhead_bytes(RecordDict({"arrays": sent}))


def test_a_message_whose_actor_dies_is_sent_again(tmp_path: Path) -> None:
    deeds = [("answer", ""), ("die once", tmp_path / "a"), *[("answer", "")] * 8]
    replies = obedient().send_and_receive(orders(*deeds))
    assert sorted(numbers(replies)) == list(range(10))


def test_a_message_that_kills_every_actor_fails_alone() -> None:
    replies = obedient(max_retries=0).send_and_receive(orders(("answer", ""), ("die", ""), *[("answer", "")] * 4))
    assert sorted(numbers(replies)) == [0, 2, 3, 4, 5]
    assert reasons(replies) == ["the process of the worker ended 1 times over it (runtime.max_retries)"]


def test_an_actor_that_hangs_is_ended_and_not_asked_again() -> None:
    begun = time.monotonic()
    replies = obedient(client_timeout=2.0).send_and_receive(orders(("sleep", 3600), *[("answer", "")] * 5))
    assert sorted(numbers(replies)) == [1, 2, 3, 4, 5]
    assert reasons(replies) == ["no reply within runtime.client_timeout=2 s"]
    assert time.monotonic() - begun < 60
    assert sorted(numbers(obedient().send_and_receive(orders(*[("answer", "")] * 4)))) == [0, 1, 2, 3]


def test_a_node_that_counts_its_data_may_take_longer() -> None:
    """The first to be asked reads the data of all clients."""
    replies = obedient(client_timeout=0.5).send_and_receive(orders(("sleep", 1.5), kind="query.describe"))
    assert (numbers(replies), reasons(replies)) == ([0], [])


def test_of_a_stack_that_hangs_only_the_culprit_fails() -> None:
    grid = obedient(client_timeout=2.0, stack=3)
    replies = grid.send_and_receive(orders(("answer", ""), ("sleep", 3600), *[("answer", "")] * 4))
    assert sorted(numbers(replies)) == [0, 2, 3, 4, 5]
    assert reasons(replies) == ["no reply within runtime.client_timeout=2 s"]


def test_of_a_stack_that_kills_every_actor_only_the_culprit_fails() -> None:
    replies = obedient(max_retries=1, stack=3).send_and_receive(orders(("answer", ""), ("die", ""), *[("answer", "")] * 4))
    assert sorted(numbers(replies)) == [0, 2, 3, 4, 5]
    assert reasons(replies) == ["the process of the worker ended 2 times over it (runtime.max_retries)"]


def test_an_exception_costs_its_own_reply() -> None:
    replies = obedient().send_and_receive(orders(("raise", "so it is"), ("answer", "")))
    assert numbers(replies) == [1]
    assert "ValueError: so it is" in reasons(replies)[0]


def test_replies_do_not_pile_up_behind_a_slow_client() -> None:
    grid = obedient()
    ids = grid.push_messages(orders(("sleep", 2), *[("answer", "")] * 60))
    early: list[Message] = []
    while ids[0] not in {reply.metadata.reply_to_message_id for reply in early}:
        early += grid.pull_messages(ids)
    assert AHEAD < len(early) <= AHEAD * 2 + 1
    while len(early) < 61:
        early += grid.pull_messages(ids)
    assert sorted(numbers(early)) == list(range(61))


def test_what_nobody_asks_for_any_more_is_not_handed_out(tmp_path: Path) -> None:
    grid = obedient()
    stale = grid.push_messages(orders(*[("sleep", 3600)] * 2, *[("die once", tmp_path / str(i)) for i in range(5)]))
    grid.pull_messages(stale)
    replies = grid.send_and_receive(orders(("answer", "")))
    assert numbers(replies) == [0]
    assert not any(tmp_path.iterdir())


def test_a_grid_that_is_given_up_leaves_its_actors_to_the_next() -> None:
    first = obedient()
    assert first.send_and_receive(orders(*[("sleep", 3600)] * 3), timeout=1.0) == []
    first.close()
    assert sorted(numbers(obedient().send_and_receive(orders(*[("answer", "")] * 4)))) == [0, 1, 2, 3]


def test_an_actor_that_died_while_it_was_idle_is_replaced() -> None:
    """Two actors are handed a message each: the dead one's is sent again."""
    grid = obedient()
    pids = processes(pool_for(OBEYING))
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    replies = grid.send_and_receive(orders(*[("answer", "")] * 4))
    assert sorted(numbers(replies)) == [0, 1, 2, 3]
    assert pids[0] not in {reply.content["metrics"]["pid"] for reply in replies}


def test_a_cluster_whose_cpus_others_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedsb.runtime.pool.LATE_S", 2.0)
    obedient()
    holder = ray.remote(num_cpus=ray.available_resources()["CPU"])(Holder).remote()
    ray.get(holder.__ray_ready__.remote())
    grid = RayGrid(Pool(replace(OBEYING, workers=1)), {"overrides": ""}, simulated_nodes(3))
    with pytest.raises(RunError, match=r"^no worker has started for minutes: others hold the cluster's CPUs"):
        grid.send_and_receive(orders(("answer", "")))


def test_more_workers_than_fit_are_refused() -> None:
    """The last one with these actors: who is refused ends Ray."""
    with pytest.raises(UserError, match=r"^1000 workers with runtime.cpus=1 each do not fit \(\d+ CPUs\); lower runtime.workers"):
        Pool(PoolSettings("tests.runtime.apps:obey", workers=1000))
    assert not ray.is_initialized()
