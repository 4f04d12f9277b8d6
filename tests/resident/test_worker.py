"""A node with a worker answers as one without, with nothing heavy in the process that the server ships, and no server can talk it over."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from shlex import join
from typing import Any

import psutil
import pytest
import yaml

import fedsb
from fedsb.core.errors import RunError
from fedsb.resident.frames import MAGIC, TAKEN, Frame, receive, send
from fedsb.resident.place import SOCKET, TOKEN
from fedsb.wire.messages import Reply, decode_reply
from tests.flower.harness import eventually
from tests.resident.contract import SUMMED, Crossing, hold, hold_nothing_of_the_data
from tests.resident.workers import PRIVATE, ROOT, Hand, ask, code, relayed, worker
from tests.strategies.federations import Federation, federate, named

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROWS = 43  # of each client
EVALUATED = ("federation.evaluate_clients=true", "data.client_test_fraction=0.2")


def test_a_federation_over_workers_ends_with_the_bits_of_one_without_and_says_what_is_in_the_contract(
    overrides: list[str], data: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    """No text of a row, no tokens, hash or salt is in any byte of any message."""
    overrides = [*overrides, *EVALUATED]

    def files(app_: Any, run_config: dict[str, Any]) -> Any:
        from tests.strategies.federations import KeepingGrid

        return KeepingGrid(app_, run_config, {i + 1: named(n, **{"data-path": str(p)}) for i, (n, p) in enumerate(sorted(data.items()))})

    alone = federate(overrides, grid=files)
    said = [{"client": name, "data": {"path": str(path)}, "device": "cpu"} for name, path in sorted(data.items())]
    with worker(tmp_path / "a", said[0]) as one, worker(tmp_path / "b", said[1]) as other:
        pids = one.pid, other.pid
        run = relayed(overrides, {1: one, 2: other}, app=(crossing := Crossing()))
        assert run.sha256 == alone.sha256
        assert run.payload() == alone.payload()
        assert [r.train_loss for r in run.records] == [r.train_loss for r in alone.records]
        assert (one.pid, other.pid) == pids
        assert not any(record.failed for record in run.records)
        assert all(len(record.held_out) == 2 for record in run.records[1:])
        assert crossing.kinds == {"query.describe", "train.evidence", "train", "evaluate"}
        values = hold(crossing, private=False, labels=run.prepared.labels, clients=[*data])
        assert values == run.prepared.adapted.layouts.up_in(1).numel
        for hand in (one, other):
            hold_nothing_of_the_data(crossing, tiny_bert, data.values(), hand.home)
        one_round = [
            *overrides,
            "federation.evaluate_clients=false",
            "init.kind=weight_svd",
            "federation.num_rounds=1",
            "federation.exactness=false",
        ]
        secure = relayed([*one_round, "federation.secure_sum=true"], {1: one, 2: other}, app=(summed := Crossing()))
    hold_a_secure_sum(secure, federate(one_round, grid=files), summed)


def hold_a_secure_sum(run: Federation, plain: Federation, crossing: Crossing) -> None:
    """Hold a round by workers that keep its keys against a plain one, and that nothing else has crossed."""
    held, wanted = run.kept.states[1], plain.kept.states[1]
    assert max(float((t - wanted[name]).abs().max()) for name, t in held.items()) < 1e-7
    assert crossing.kinds == {"query.describe", "train", *SUMMED}
    values = hold(crossing, private=False, labels=run.prepared.labels, clients=sorted(run.records[1].clients))
    assert values == run.prepared.adapted.layouts.up_in(1).numel + 1


def test_what_is_shipped_imports_neither_torch_nor_transformers(strict: Hand, overrides: list[str]) -> None:
    config = {"client": "", "clients": "[]", "labels": '["film", "sport", "trade"]'}
    script = f"""
import sys
from fedsb.client_app import app
from fedsb.core.errors import RunError
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
message = Message(RecordDict({{"config": ConfigRecord({config})}}), 1, "query.describe")
message.metadata.__dict__["_message_id"] = "asked"
reply = app(message, Context(7, 1, {strict.node_config}, RecordDict(), {{"overrides": {join([*overrides, *PRIVATE])!r}}}))
print(dict(reply.content["config"]), dict(reply.content["metrics"]))
print(sorted({{"torch", "transformers", "opacus", "hydra", "datasets"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    first, second = done.stdout.splitlines()
    assert f"'resident': '{fedsb.__version__}'" in first, done.stderr
    assert "'client': 'client-1'" in first
    assert f"'num-examples': [{ROWS}]" in first
    assert second == "[]"


HOSTILE: dict[str, tuple[list[str], str, str]] = {
    "no privacy": ([], "policy", "privacy.unit"),
    "next to no noise": ([*PRIVATE, "privacy.noise_multiplier=0.001"], "policy", "privacy.noise_multiplier"),
    "without end": ([*PRIVATE, "train.local_steps=null", "train.local_epochs=10000"], "policy", "train.local_epochs"),
    "another model": ([*PRIVATE, "model.name=/etc"], "model", "model.name"),
    "a model by its shape": ([*PRIVATE, "model.kind=config"], "model", "model.kind"),
    "a run's folder of the node": ([*PRIVATE, "resume=/etc"], "refused", "resume"),
    "a module to import": ([*PRIVATE, "hydra.searchpath=[pkg://unittest.__main__]"], "refused", ""),
    "a file out of the groups": ([*PRIVATE, "experiment=../../../../../tmp/x"], "refused", ""),
    "the environment": ([*PRIVATE, "seed=${oc.env:HOME}"], "refused", "seed"),
}


@pytest.mark.parametrize("kind", ["query.describe", "train"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_server_app_is_refused(case: str, kind: str, strict: Hand, overrides: list[str]) -> None:
    more, why, key = HOSTILE[case]
    reply = ask(strict, [*overrides, *more], kind)
    assert (reply.code, reply.key) == (code(why), key)


def test_what_a_server_says_of_data_is_nothing_to_a_node(strict: Hand, overrides: list[str]) -> None:
    """Its own rows are counted, whatever path the run names, and of the client that it serves."""
    assert ask(strict, [*overrides, *PRIVATE, "data.path=/etc/passwd"]).num_examples == ROWS
    assert ask(strict, [*overrides, *PRIVATE], client="client-0").num_examples == ROWS  # it says whom it serves itself
    assert ask(strict, [*overrides, *PRIVATE], "train", client="client-0").code == code("refused")


def talk(hand: Hand, frame: Frame) -> Frame:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(hand.place / SOCKET))
        peer.settimeout(20)
        with suppress(BrokenPipeError):  # it may answer before it has all
            send(peer, frame)
        return receive(peer, 2**20)


def test_whoever_is_no_relay_of_this_version_is_told_so(strict: Hand) -> None:
    token, before = (strict.place / TOKEN).read_text(), strict.pid
    good = {"token": token, "version": fedsb.__version__, "kind": "query.describe", "run": 1, "overrides": "", "records": {}}
    for changed, what in (
        ({"token": "0" * 64}, "token"),
        ({"token": None}, "token"),
        ({"token": "é"}, "token"),
        ({"token": "\ud800"}, "token"),
        ({"version": "0.0.9"}, "version"),
        ({"kind": "train.everything"}, "frame"),
        ({"kind": ["train"]}, "frame"),
        ({"run": "1"}, "frame"),
        ({"overrides": None}, "frame"),
        ({"records": {"config": {"pickle": "x"}}}, "frame"),
    ):
        assert talk(strict, Frame({**good, **changed})).head["refused"] == what
    assert talk(strict, Frame({**good, "records": {}}, (b"x" * 20_000_000,))).head["refused"] == "frame"
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(strict.place / SOCKET))
        peer.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert receive(peer, 1000).head["refused"] == "frame"
    for raw in (b'{"head": {}, "sizes": [' + b"9" * 4300 + b"]}", b'{"head": {}, "sizes": [' + b"0," * 70_000 + b"0]}"):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(strict.place / SOCKET))
            peer.sendall(MAGIC + struct.pack(">Q", len(raw)) + raw)
            assert receive(peer, 1000).head["refused"] == "frame"
    notice = talk(strict, Frame({**good, "kind": "query.notice"}))
    assert notice.head == {TAKEN: True}
    assert strict.process.poll() is None
    assert strict.pid == before
    assert "a peer without this worker's token" in strict.node_log


def test_a_worker_that_dies_is_told_by_a_code_and_comes_again(strict: Hand, overrides: list[str]) -> None:
    """What was charged before stays charged, to the line."""
    slow = [*overrides, *PRIVATE, "train.local_steps=4000", "privacy.noise_multiplier=50", "method=ffa_lora", "init.kind=random"]
    before, replies = strict.pid, []
    training = threading.Thread(target=lambda: replies.append(train(strict, slow)))
    training.start()
    ledgers = strict.home / "ledgers"
    assert eventually(lambda: any(ledgers.glob("*/ledger.jsonl")) and "train" in charged(ledgers), 60)
    said = charged(ledgers)
    psutil.Process(before).kill()
    training.join(30)
    assert [reply.code for reply in replies] == [code("worker")]
    assert ask(strict, [*overrides, *PRIVATE]).num_examples == ROWS  # waits until it is there again
    assert strict.pid != before
    assert charged(ledgers).startswith(said)
    assert "the worker ended with status -9; it is started again" in strict.log.read_text()


def train(hand: Hand, overrides: list[str], *, fails: bool = True, crossing: Crossing | None = None) -> Reply:
    """Send a first training message as the server does, and return the reply; the run ends where there is none that counts."""
    noting = Crossing(run="ab" * 16) if crossing is None else crossing
    alone = ["federation.names=[client-1]", "federation.num_clients=1", "federation.num_rounds=1", "federation.min_replies=1"]
    with pytest.raises(RunError) if fails else nullcontext():
        relayed([*overrides, *alone], {1: hand}, app=noting)
    return next(decode_reply(reply.content) for message, reply in noting.seen if message.metadata.message_type == "train")


def charged(ledgers: Path) -> str:
    return "".join(path.read_text() for path in sorted(ledgers.glob("*/ledger.jsonl")))


def test_data_that_change_are_read_again(strict: Hand, overrides: list[str]) -> None:
    config = strict.place.parent / "node.yaml"
    said = yaml.safe_load(config.read_text())
    table = next(Path(said["data"]["path"]).rglob("*.jsonl"))
    whole = table.read_text()
    try:
        table.write_text("".join(whole.splitlines(keepends=True)[:30]))
        assert ask(strict, [*overrides, *PRIVATE]).num_examples == 30
    finally:
        table.write_text(whole)
    assert ask(strict, [*overrides, *PRIVATE]).num_examples == ROWS


def test_rows_that_come_later_are_in_the_ledger(hands: list[Hand], data: dict[str, Path], overrides: list[str]) -> None:
    free, table = hands[0], next(data["client-0"].rglob("*.jsonl"))
    whole = table.read_text()
    try:
        known = []
        for more in (0, 5):
            table.write_text(whole + "".join(f'{{"text": "new words {i}", "label": "film"}}\n' for i in range(more)))
            assert ask(free, overrides, client="client-0").num_examples == ROWS + more
            known.append(sum(path.stat().st_size for path in (free.home / "ledgers").glob("*/rows")))
        assert known[1] >= known[0] + 5 * 8
    finally:
        table.write_text(whole)


def test_what_a_worker_writes_is_nobody_elses(hands: list[Hand], overrides: list[str]) -> None:
    for hand in hands:
        assert ask(hand, [*overrides, "rnak=3"]).code == code("refused")
        assert "unknown key 'rnak'" in hand.node_log
        modes = {path: path.stat().st_mode & 0o077 for path in (hand.home, *hand.home.rglob("*"))}
        assert not {str(path): oct(mode) for path, mode in modes.items() if mode}


def test_nobody_writes_a_line_of_the_log_but_the_worker(strict: Hand, overrides: list[str]) -> None:
    forged = "x\n2026-11-28 00:00:00,000 WARNING FORGED \ud800"
    assert ask(strict, [*overrides, *PRIVATE], "train", client=forged).code == code("refused")
    assert not any(line.startswith("2026-11-28 00:00:00,000 WARNING FORGED") for line in strict.node_log.splitlines())
    assert "FORGED" in strict.node_log
    assert ask(strict, ["rank=" + "1" * 70_000]).code == code("refused")
    assert max(map(len, strict.node_log.splitlines())) < 9000


def test_a_run_asks_for_the_same_in_all_its_messages_and_a_private_one_says_what_is_in_the_contract(
    tmp_path: Path, data: dict[str, Path], tiny_bert: Path, overrides: list[str]
) -> None:
    """Its first one was checked and planned: a later one of another model or with other steps would go by what was found then."""
    noised = [*PRIVATE, "privacy.noise_multiplier=50", *EVALUATED, "privacy.eval_fraction=0.2"]
    first, crossing = [*overrides, *noised, "init.kind=random", "method=ffa_lora"], Crossing(run="ab" * 16)
    said = {"client": "client-1", "data": {"path": str(data["client-1"])}, "device": "cpu", "privacy": {"unit": "example"}}
    with worker(tmp_path / "c", said) as hand:
        assert train(hand, first, fails=False, crossing=crossing).code == 0
        assert crossing.kinds == {"query.describe", "train", "evaluate"}
        hold(crossing, private=True, labels=["film", "sport", "trade"], clients=["client-1"])
        hold_nothing_of_the_data(crossing, tiny_bert, [data["client-1"]], hand.home)
        changed = train(hand, [*first, "train.local_steps=3"])
        assert changed.code == code("refused")
        assert "not those of its earlier messages" in hand.node_log
        assert train(hand, first, fails=False).code == 0
