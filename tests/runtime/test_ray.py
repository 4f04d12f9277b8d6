"""Messages over Ray actors: what dies is replaced and asked again, what hangs is ended, and the bits are those of one process."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import join
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedsb import cli, client_app, client_stack
from fedsb.commands import run as run_command
from fedsb.config.compose import load
from fedsb.config.schema import Config
from fedsb.core.errors import RunError, UserError
from fedsb.core.logs import run_log
from fedsb.core.state import Name, State
from fedsb.models.build import forget_models
from fedsb.privacy.account import DIAGNOSTICS, LEDGERS
from fedsb.run.folder import read_run
from fedsb.runtime.cluster import RAY_SWITCHES
from fedsb.runtime.grid import simulated_nodes
from fedsb.runtime.grids import CLIENT, TOGETHER
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.pool import Pool, PoolSettings, close_pools, pool_for, pools
from fedsb.runtime.ray import AHEAD, RayGrid
from fedsb.server_app import serve
from fedsb.wire.arrays import decode_arrays, encode_arrays
from fedsb.wire.byte_counts import overhead_bytes
from tests.runtime.apps import Holder
from tests.strategies.private_runs import EXAMPLE, small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # Ray leaves its log files and child processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def ended() -> Iterator[None]:
    """Leave no Ray behind."""
    yield
    close_pools()
    gc.collect()


OBEYING = PoolSettings("tests.runtime.apps:obey", "tests.runtime.apps:obey_all", workers=2, cpus=0.5)
TRAINING = PoolSettings(CLIENT, TOGETHER, workers=3, cpus=0.5, device="cpu")


def ready(pool: Pool) -> Pool:
    """Wait until all actors of a pool are there."""
    pool.fill()
    while pool.starting:
        pool.came(ray.wait(pool.starting, num_returns=1)[0])
    return pool


def processes(pool: Pool) -> list[int]:
    """Return the process of each actor of a pool that is ready and has nothing to do."""
    found: list[int] = ray.get([actor.call.remote(os.getpid) for actor in pool._idle])
    return sorted(found)


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


def test_an_address_without_a_cluster_is_named() -> None:
    close_pools()
    with pytest.raises(UserError, match=r"^no Ray cluster at runtime.address=127.0.0.1:1 \(.*\); start one with 'ray start --head'"):
        pool_for(replace(OBEYING, address="127.0.0.1:1"))


def test_a_ray_that_does_not_start_is_one_line(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    close_pools()
    (tmp_path / "taken").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "taken" / "below"))
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit, match="1"):
        cli.main(["run", *small(tiny_bert, tmp_path), "runtime=ray", f"output={tmp_path / 'run'}"])
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: the run stopped: Ray does not start on this machine: ")
    assert str(tmp_path / "taken") in said


class Killing(RayGrid):
    """Kills, by its process, an actor at work, when it has handed out so many replies; any, where none is seen at it: work is short."""

    kills: tuple[int, ...] = ()
    replies = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        if self.kills and self.replies >= self.kills[0] and (busy := working() or (idle() if self._running else [])):
            self.kills = self.kills[1:]
            os.kill(busy[0], signal.SIGKILL)
        found = super().pull_messages(message_ids)
        self.replies += len(found)
        return found


def working() -> list[int]:
    """Return the processes of this one's actors that are answering a message."""
    return named("ray::Worker.answer")


def idle() -> list[int]:
    """Return the processes of actors that are not."""
    return named("ray::Worker")


def named(title: str) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process.pid] * (process.cmdline()[:1] == [title])
    return found


def federate(folder: Path, overrides: Sequence[str], kills: tuple[int, ...] | None = None, stack: int = 1) -> dict[str, Any]:
    """Run a federation in this process, or on three actors, some of which are killed, and return its summary."""
    run_config = {"overrides": join(overrides), "output": str(folder)}
    if kills is None:
        together = client_stack.answer_together
        return serve(load(list(overrides)), LocalGrid.simulation(client_app.app, run_config, stack=stack, together=together), folder)
    pool = pool_for(TRAINING)
    grid = Killing(pool, run_config, simulated_nodes(), stack=stack)
    grid.kills = kills
    try:
        forget_models()  # of the run in this process, or nothing would be shared
        return serve(load(list(overrides)), grid, folder)
    finally:
        assert not grid.kills
        assert pool.networks


RUNS = {
    "fed_sb": ("init.kind=gradient", "init.num_examples=8", "init.power_iterations=0"),
    "fedex_lora": ("method=fedex_lora", "federation.fraction=0.75"),
    "private examples": (*EXAMPLE, "init.kind=weight_svd"),
    "fedsa_lora": ("method=fedsa_lora",),  # what a client keeps of its own serves whichever worker it comes to next
}


KILLS = {"fed_sb": (2,), "fedex_lora": (5,), "private examples": (2, 5), "fedsa_lora": (5,)}


@pytest.mark.parametrize("name", RUNS)
def test_the_bits_are_those_of_one_process_whoever_dies(
    name: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, *RUNS[name])
    whole = federate(tmp_path / "whole", overrides)
    again = federate(tmp_path / "ray", overrides, KILLS[name])
    assert {key for key in whole if again[key] != whole[key]} <= {"wall_s", "cpu_s"}
    assert charged(tmp_path / "ray") == charged(tmp_path / "whole")
    told, alone = ([record.client_metrics for record in read_run(tmp_path / name).records] for name in ("ray", "whole"))
    assert told == alone


def test_a_stack_has_the_bits_that_it_has_in_one_process(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd")
    whole = federate(tmp_path / "whole", overrides, stack=2)
    again = federate(tmp_path / "ray", overrides, (2,), stack=2)
    assert again["factors_sha256"] == whole["factors_sha256"]


def test_the_same_clients_fail_on_purpose(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "faults.crash=0.5", "federation.min_replies=1")
    whole, again = federate(tmp_path / "whole", overrides), federate(tmp_path / "ray", overrides, ())
    failed, other = ([record.failed for record in read_run(tmp_path / name).records] for name in ("whole", "ray"))
    assert failed == other
    assert len(failed) == 3
    assert 0 < sum(map(len, failed)) < 8
    assert all("(faults.crash)" in reason for record in failed for reason in record.values())
    assert again["factors_sha256"] == whole["factors_sha256"]


def charged(folder: Path) -> dict[str, list[str]]:
    """Return the lines of every ledger of a run, and what clients noted beside: twice, where one died between its note and its reply."""
    lines = {path: path.read_text().splitlines() for path in sorted((folder / LEDGERS).rglob("*.jsonl"))}
    return {
        str(path.relative_to(folder)): list(dict.fromkeys(found)) if path.name == DIAGNOSTICS else found for path, found in lines.items()
    }


def test_the_next_job_of_a_sweep_finds_actors_and_model_warm(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command itself, in this process: the same actors, and a base model that was laid down once."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_rounds=1", "runtime=ray", "runtime.workers=3")
    seen: list[tuple[list[int], list[ray.ObjectRef]]] = []
    run_job = run_command.run_job

    def noted(given: Config, overrides: list[str], output: Path) -> int:
        status = run_job(given, overrides, output)
        (pool,) = pools()
        seen.append((processes(pool), [ref for [ref] in pool.networks.values()]))
        return status

    monkeypatch.setattr(run_command, "run_job", noted)
    ready(pool_for(TRAINING)).networks.clear()
    forget_models()
    assert cli.run(["-m", *overrides, "runtime.cpus=0.5", "train.lr=0.01,0.02", f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    assert len(seen) == 2
    assert len(set(seen[0][0])) == 3
    assert len(seen[0][1]) == 1
    assert seen[0] == seen[1]
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2


class Cluster:
    """A cluster that is there before a run and after it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self.said()

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def cpus(self) -> tuple[float, float]:
        """Return how many it has and how many are free."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        whole, free = self.said().split()
        return float(whole), float(free)

    def cpus_within(self, seconds: float, wanted: tuple[float, float]) -> bool:
        """Wait until so many are free."""
        deadline = time.monotonic() + seconds
        while (found := self.cpus()) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        return found == wanted


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Start a cluster in a process of its own, and end it with all of its processes."""
    close_pools()
    command, root = [sys.executable, "-m", "tests.runtime.cluster_head"], Path(__file__).resolve().parents[2]
    environment = {**os.environ, **RAY_SWITCHES}
    with subprocess.Popen(command, cwd=root, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        made = Cluster(process)
        below = psutil.Process(process.pid).children(recursive=True)
        yield made
        process.communicate(timeout=60)  # the end of its input
    assert not psutil.wait_procs(below, timeout=30)[1]


def test_a_cluster_that_is_joined_gives_the_same_bits_and_lives_on(
    cluster: Cluster, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides, folder = small(tiny_bert, tmp_path, "init.kind=weight_svd"), tmp_path / "run"
    whole = federate(tmp_path / "whole", overrides)
    joined = ["runtime=ray", f"runtime.address={cluster.address}", "runtime.workers=2", "runtime.cpus=0.5", f"output={folder}"]
    forget_models()
    assert cli.run([*overrides, *joined]) == 0
    ready(pools()[0])
    assert cluster.cpus_within(30, (2.0, 1.0)), "two actors of half a CPU each"
    assert json.loads((folder / "summary.json").read_text())["factors_sha256"] == whole["factors_sha256"]
    close_pools()
    assert cluster.cpus_within(30, (2.0, 2.0))  # Ray ends the actors of a driver that has left when it notices


def heed_interrupts() -> None:
    """Undo what a shell does to commands in the background, whose children would ignore Ctrl-C, as a terminal's do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


SIGNALS = {
    # Ctrl-C in a terminal reaches the whole group of processes; SIGTERM the one that it is sent to, where Ray has a handler of its own.
    "interrupted": (os.killpg, signal.SIGINT, 130),
    "ended by SIGTERM": (os.kill, signal.SIGTERM, 143),
}


def test_interrupted_it_leaves_a_checkpoint_and_no_process(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either signal, one after the other; and what is left goes on to the bits of a run left alone."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    overrides = small(tiny_bert, tmp_path, "init.kind=weight_svd", "federation.num_rounds=40")
    whole, folder = federate(tmp_path / "whole", overrides), tmp_path / "run"
    ray_of_one = ["runtime=ray", "runtime.workers=1", "runtime.cpus=0.5", "progress=lines"]
    given = [*overrides, *ray_of_one, f"output={folder}", f"hydra.run.dir={folder}"]
    for how, (send, number, status) in SIGNALS.items():
        with subprocess.Popen(
            [sys.executable, "-m", "fedsb.cli", "run", *given],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if re.match("round +[1-9]", line))
            below = psutil.Process(process.pid).children(recursive=True)
            send(process.pid, number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == status
        assert said.splitlines()[-1] == f"{how}; go on with: fedsb run resume={folder}"
        assert "Traceback" not in said
        assert not (folder / "summary.json").exists()
        assert below
        assert not psutil.wait_procs(below, timeout=30)[1]
        given = [f"resume={folder}", "progress=lines"]
    # In this process: what a resumed run ends with hangs on its folder, whatever had computed until then.
    assert cli.run([f"resume={folder}", "runtime=local"]) == 0
    assert json.loads((folder / "summary.json").read_text())["factors_sha256"] == whole["factors_sha256"]
