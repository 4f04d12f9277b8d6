"""Where a worker can be found, who may talk to it, and what stops it from beginning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedsb.cli import main
from fedsb.client_app import app
from fedsb.resident.place import OWNER, SOCKET, TOKEN, WORKER, PlaceError, token_at
from fedsb.wire.messages import decode_reply
from tests.resident.workers import ROOT, Hand, code

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
NOBODY = 65534


@pytest.mark.skipif(os.getuid() != 0, reason="another user can only be tried by root")
def test_another_user_can_neither_read_nor_talk(strict: Hand) -> None:
    script = f"""
import os, socket, sys
os.setgid({NOBODY}); os.setuid({NOBODY})
for path in {[str(strict.place / TOKEN), str(strict.place / SOCKET)]}:
    try:
        socket.socket(socket.AF_UNIX).connect(path) if path.endswith("sock") else open(path)
        print("open", path)
    except PermissionError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_that_is_not_the_workers_own_is_not_talked_to(tmp_path: Path, strict: Hand) -> None:
    assert token_at(strict.place) == token_at(strict.place, str(os.getuid()))
    with pytest.raises(PlaceError, match=r"belongs to user \w+; name the worker's with worker-user="):
        token_at(strict.place, str(NOBODY))
    with pytest.raises(PlaceError, match=r"^worker-user=nobody-at-all: this machine has no such user$"):
        token_at(strict.place, "nobody-at-all")
    with pytest.raises(PlaceError, match="must begin at the root"):
        token_at(Path("here"))
    strict.place.chmod(0o777)
    try:
        with pytest.raises(PlaceError, match="others than its owner may write"):
            token_at(strict.place)
    finally:
        strict.place.chmod(0o700)
    with pytest.raises(PlaceError, match="is longer than the 107 bytes"):
        token_at(tmp_path / ("x" * 100))


def test_keys_beside_a_workers_are_told_by_a_code(strict: Hand, overrides: list[str]) -> None:
    for beside in ({"client": "client-1"}, {"file": "/etc/node.yaml"}):
        message = Message(RecordDict({"config": ConfigRecord({})}), 1, "query.describe")
        message.metadata.__dict__["_message_id"] = "asked"
        reply = app(message, Context(7, 1, {**strict.node_config, OWNER: str(os.getuid()), **beside}, RecordDict(), {"overrides": ""}))
        assert decode_reply(reply.content).code == code("node_config")
        assert decode_reply(reply.content).key == WORKER


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": ([], "error: fedsb worker takes a node's file"),
    "another flag": (["--nod", "x"], "error: unknown flag '--nod'"),
    "a file that is not there": (["--node", "/nowhere/node.yaml"], "error: '/nowhere/node.yaml' can't be read"),
    "a group that is none": (["--node", "{node}", "--at", "{folder}/w", "--group", "nobody-at-all"], "no such group"),
    "a place that is taken": (["--node", "{node}", "--at", "{taken}"], "error: a worker is at '"),
    "a path too long": (["--node", "{node}", "--at", "{folder}/" + "x" * 100], "is longer than the 107 bytes"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_worker_that_cannot_begin_says_so_in_one_line(
    case: str, strict: Hand, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, line = MISTAKES[case]
    node = strict.place.parent / "node.yaml"
    with pytest.raises(SystemExit) as ended:
        main(["worker", *(each.format(node=node, folder=tmp_path, taken=strict.place) for each in given)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert line in said
    assert len(said.splitlines()) == 1


def test_what_cannot_begin_is_not_begun_again() -> None:
    command = [sys.executable, "-m", "fedsb.cli", "worker", "--node", "/nowhere/node.yaml", "--supervise"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: '/nowhere/node.yaml' can't be read")
