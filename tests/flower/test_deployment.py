"""A real federation on one machine: a SuperLink and two SuperNodes, one with a worker, each with the data of the client that it serves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from fedsb.run.checkpoint import load_checkpoint
from fedsb.run.folder import read_run
from fedsb.runtime.flower import CONNECTION, LocalFlower
from tests.conftest import encoder_tokenizer, save
from tests.flower.conftest import local
from tests.flower.forwarder import Wire
from tests.flower.harness import ROOT, belonging_to, deployment, eventually, submitting, summary
from tests.resident.workers import worker
from tests.strategies.private_runs import EXAMPLE, rdp_epsilon, releases

# Each message has a process of its own at a node, and what a client keeps lies on its disk.
OWN = ("method=fedsa_lora", "federation.num_rounds=2", "eval.every=2", "federation.wire_dtype=int8", "rank=128")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


def said_of(data: Path, client: str) -> dict[str, Any]:
    """Return what the operator of one of the two says: bounds that the run keeps, and a cache of its own."""
    said = {"client": client, "data": {"path": str(data / client)}, "device": "cpu", "methods": ["fedsa_lora", "fed_sb"]}
    limits = {"max_local_epochs": 100, "max_seconds": 300}
    return {**said, "cache": {"folder": str(data / f"cache-{client}"), "gb": 1}, "limits": limits}


def wide(folder: Path) -> Path:
    """Leave a model whose uploads are of more than a megabyte."""
    tokenizer = encoder_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, pad_token_id=tokenizer.pad_token_id, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return save(BertModel(config), tokenizer, folder)


@contextmanager
def counting(wires: list[Wire], output: Path) -> Iterator[dict[int, tuple[int, int]]]:
    """Yield the bytes up and down that had gone over all wires when the record of a round was there, by round."""
    found: dict[int, tuple[int, int]] = {}
    over, path = threading.Event(), output / "metrics.jsonl"

    def look() -> None:
        while not over.wait(0.02):
            number = path.read_bytes().count(b"\n") - 1 if path.exists() else -1
            if number not in found:
                up, down = zip(*((wire.outside.up, wire.outside.down) for wire in wires), strict=True)
                found[number] = (sum(up), sum(down))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


Submitted = Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], Path]]]
PRIVATE = (*EXAMPLE, "init.kind=weight_svd", "federation.num_rounds=2", "privacy.accountant=rdp", "plots=false")


def a_private_run_that_is_killed_goes_on(
    submitted: Submitted, flower: LocalFlower, homes: Sequence[Path], data: Path, output: Path
) -> None:
    """It is killed when a node has charged the last round and is at work on it, and goes on at once: each is charged once for each round.

    What comes out is the mean of what the nodes keep as what they were charged for, and epsilon that of their ledgers.
    """

    def charges() -> list[dict[str, Any]]:
        lines = [line for home in homes for path in home.glob("ledgers/*/ledger.jsonl") for line in path.read_bytes().split(b"\n")[1:-1]]
        return [json.loads(line) for line in lines]

    with submitted("private", f"output={output}", *PRIVATE) as (_, shown):
        assert eventually(lambda: any(each["key"][1] == 2 for each in charges()), 300, pause=0.05), shown.read_text()
        kill_server(flower, shown)
    assert not (output / "summary.json").exists()
    with submitting(CONNECTION, [f"resume={output}"], environment=flower.environment, folder=output.with_name("again")) as (again, shown):
        _, err = again.communicate(timeout=400)
    assert (again.returncode, err) == (0, ""), shown.read_text()
    assert "resumed after round 1" in shown.read_text()
    assert sorted(each["key"][1:] for each in charges()) == [[number, "train", f"client-{i}"] for number in (1, 2) for i in (0, 1)]
    assert {each["attempt"] for each in charges()} == {1}
    found = summary(output)
    assert found["failures"] == 0
    of_one = [rdp_epsilon(releases([each for each in charges() if each["key"][3] == f"client-{i}"])) for i in (0, 1)]
    assert found["epsilon"]["max"] == pytest.approx(max(of_one), rel=1e-3)
    kept, counts = [], []
    for number, home in enumerate(homes):
        [path] = home.glob("ledgers/*/reply-*-2-*.safetensors")
        kept.append(load_file(path))
        counts.append(sum(len(each.read_text().splitlines()) for each in (data / f"client-{number}").glob("*.jsonl")))
    last = {f"{name.role}|{name.module}": t for name, t in load_checkpoint(output / "checkpoints").state.items()}
    assert kept[0].keys() == last.keys()
    for name, t in last.items():
        mean = sum(count * replies[name].double() for count, replies in zip(counts, kept, strict=True)) / sum(counts)
        assert torch.allclose(t.double(), mean, rtol=1e-5, atol=1e-7)


def kill_server(flower: LocalFlower, shown: Path) -> None:
    """Kill the one ServerApp that runs."""
    servers = [process for process in flower.processes() if "flwr-serverapp" in " ".join(process.cmdline())]
    assert len(servers) == 1, shown.read_text()
    servers[0].kill()


def test_two_supernodes_end_with_the_factors_of_the_simulation_and_killed_runs_are_told_and_go_on(base, overrides, tmp_path):
    """One whose clients nobody serves is found out by Flower while others run; of one the clients keep something, one is private.

    What goes over the wire, TLS included, is what the records count, and no text of a row.
    """
    own = (*OWN, f"model.name={wide(tmp_path / 'wide')}")
    data, output = tmp_path / "data", tmp_path / "kept" / "run"
    split = [sys.executable, str(ROOT / "scripts" / "split_data.py"), str(data), *overrides]
    subprocess.run(split, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    test_part = f"data.test_path={data / 'server' / 'test.jsonl'}"
    plain = {"client": "client-0", "data-path": str(data / "client-0")}
    wires: list[Wire] = []
    with (
        worker(tmp_path / "w", said_of(data, "client-1")) as hand,
        deployment(tmp_path / "flower", [hand.node_config, plain], wires) as flower,
    ):

        def submitted(name: str, *more: str) -> AbstractContextManager[tuple[subprocess.Popen[str], Path]]:
            return submitting(CONNECTION, [*base, test_part, *more], environment=flower.environment, folder=tmp_path / name)

        with submitted("killed", "federation.names=[nobody,noone]", f"output={tmp_path / 'lost'}") as (lost, waiting):
            assert eventually(lambda: "waiting for nobody, noone" in waiting.read_text(), 200, pause=1.0), waiting.read_text()
            kill_server(flower, waiting)
            homes = (tmp_path / "flower" / "node-1" / "fedsb", hand.home)
            # Before the other: its epsilon is of all that the ledgers hold, which then answer without noise.
            a_private_run_that_is_killed_goes_on(submitted, flower, homes, data, tmp_path / "private-run")
            with submitted("whole", f"output={output}", *own) as (whole, shown), counting(wires, output) as by_round:
                simulated = local([*overrides, *own], tmp_path / "simulated")
                _, err = whole.communicate(timeout=400)
            assert (whole.returncode, err) == (0, "")
            _, err = lost.communicate(timeout=200)
        assert lost.returncode == 1
        assert re.fullmatch(rf"error: run \d+ failed: its ServerApp was killed, .*; go on with resume={tmp_path / 'lost'}\n", err)
        assert "no reply" not in hand.node_log
    assert "round 2/2" in shown.read_text()
    assert "limits of operators: held by a worker at client-1" in shown.read_text()
    assert "limits of operators: advisory, for no worker answers, at client-0" in shown.read_text()
    assert summary(output)["factors_sha256"] == simulated["factors_sha256"]
    told, alone = ([record.client_metrics for record in read_run(tmp_path / kind / "run").records] for kind in ("kept", "simulated"))
    assert told == alone
    assert [len(metrics) for metrics in told] == [0, 0, 2]
    last = read_run(output).records[-1]
    up, down = (after - before for before, after in zip(by_round[1], by_round[2], strict=True))
    assert last.payload_up > 2e6  # of two clients
    assert last.payload_up <= up <= 1.1 * last.payload_up
    assert last.payload_down <= down <= 1.1 * last.payload_down
    rows = [json.loads(line)["text"] for path in data.glob("client-*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) > 20
    passed = b"".join(bytes(kept) for wire in wires for kept in wire.inside.kept)
    assert b"fedsb" in passed
    assert not [row for row in rows if row.encode() in passed]
    assert not [process for folder in (tmp_path / "flower").iterdir() for process in belonging_to(folder)]
