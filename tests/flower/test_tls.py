"""A federation over TLS by its own commands: who gets in, who is put out, and runs that outlive a SuperLink and a node."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import psutil
import pytest

from fedsb.federation.certificates import certify, node_key
from fedsb.federation.held import running
from fedsb.federation.link import Link
from fedsb.federation.registry import known_keys
from scripts.demo_federation import left_running
from tests.flower.conftest import local
from tests.flower.harness import eventually, summary
from tests.flower.sides import Sides, failures, kill_below

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHORT = ("federation.num_rounds=4", "init.kind=weight_svd")


def test_keys_decide_who_serves_whom_and_runs_outlive_a_superlink_and_a_node(base, overrides, tmp_path: Path) -> None:
    sides, output = Sides(tmp_path, overrides), tmp_path / "run"
    nodes = [sides.node(f"node-{i}", f"client-{i}") for i in (0, 1)]
    with sides.serving() as server:
        sides.admit(nodes[0], "client-0")
        strangers_get_no_further(sides)
        with sides.joining(nodes[0]), sides.submitting("watched", *base, sides.test_part, f"output={output}", *SHORT) as (_, shown):
            a_key_serves_the_client_it_is_registered_for(sides, nodes[1], shown)
            with sides.joining(nodes[1]) as second:
                assert eventually(lambda: len(failures(output)) > 1, 200), shown.read_text()
                below = kill_below(server, "flower-superlink")
                assert server.wait(100) == 1
                assert not psutil.wait_procs(below, timeout=20)[1]
                with sides.serving():
                    it_goes_on(sides, output, len(failures(output)) - 1)
                    a_node_that_is_killed_is_missed_and_comes_back(sides, base, nodes[1], second)
    assert running(sides.server) is None
    assert not left_running(tmp_path)
    known = known_keys(Link(sides.server).database).values()
    assert sorted((node.name, node.valid) for node in known) == [("client-0", True), ("client-1", True), ("client-9", False)]
    simulated = local([*overrides, *SHORT], tmp_path / "simulated")
    assert summary(output)["factors_sha256"] == simulated["factors_sha256"]


def strangers_get_no_further(sides: Sides) -> None:
    """With a key that nobody has registered, and with an authority that is not the server's."""
    stranger = sides.node("stranger", "client-0")
    with sides.knocking(stranger):
        assert eventually(lambda: "the SuperLink does not let it in: it does not know" in sides.said(stranger), 100), sides.said(stranger)
    certify(sides.folder / "another", [])
    shutil.copyfile(sides.folder / "another" / "ca.crt", stranger / "ca.crt")
    with sides.knocking(stranger) as process:
        assert process.wait(60) == 2
    assert re.search(r"^error: the certificate of \S+ is not of the authority in .*\n\Z", sides.said(stranger), re.MULTILINE)


def a_key_serves_the_client_it_is_registered_for(sides: Sides, node: Path, shown: Path) -> None:
    """Under another's it waits, and says so to both; revoked it is put out; under its own it is let in."""
    wrong = sides.admit(node, "client-9")
    with sides.joining(node) as impostor:
        assert eventually(lambda: "and its key is registered as 'client-9'" in shown.read_text(), 200, pause=1.0), shown.read_text()
        wrong.unlink()
        assert impostor.wait(100) == 1
    assert "error: the SuperNode ended: the SuperLink refuses its key: it was revoked" in sides.said(node)
    for half in ("key", "key.pub"):  # Flower registers a key once
        (node / half).unlink()
    node_key(node / "key")
    sides.admit(node, "client-1")


def it_goes_on(sides: Sides, output: Path, done: int) -> None:
    with sides.submitting("again", f"resume={output}") as (submitted, shown):
        _, err = submitted.communicate(timeout=300)
    assert (submitted.returncode, err) == (0, ""), shown.read_text()
    assert f"resumed after round {done}" in shown.read_text()


def a_node_that_is_killed_is_missed_and_comes_back(sides: Sides, base: list[str], node: Path, process) -> None:
    """The round goes on with the other when its time is over; from the next on it is served what it has missed."""
    output = sides.folder / "away"
    few = ("federation.min_replies=1", "federation.timeout=45", "federation.num_rounds=500", "init.kind=weight_svd", "eval.every=500")
    with sides.submitting("without", *base, sides.test_part, f"output={output}", *few) as (_, shown):
        assert eventually(lambda: len(failures(output)) > 1, 200), shown.read_text()
        kill_below(process, "flower-supernode")
        assert process.wait(100) == 1
        assert "error: the supernode ended with status -9" in sides.said(node)
        with sides.joining(node):
            assert eventually(lambda: any("client-1" in failed for failed in failures(output)), 200), shown.read_text()
            assert eventually(lambda: "client-1" not in failures(output)[-1], 200), shown.read_text()
    assert all(failed.keys() <= {"client-1"} for failed in failures(output))
