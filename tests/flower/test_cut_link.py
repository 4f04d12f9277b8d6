"""A node in a network of its own, whose link is cut in the midst of a run and comes back; where the machine lets a test make networks."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from scripts.demo_federation import left_running
from tests.flower.harness import eventually
from tests.flower.sides import Sides, failures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVER, NODE = "10.213.7.1", "10.213.7.2"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network() -> Iterator[str]:
    """Make a network of its own, whose one link leads to here, for the length of a block; skip the test where that can't be."""
    name, here, there = (f"{kind}{os.getpid()}" for kind in ("fedsb", "fh", "ft"))
    with ExitStack() as stack:
        try:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
            ip("addr", "add", f"{SERVER}/30", "dev", here)
            ip("link", "set", here, "up")
            for arguments in (("addr", "add", f"{NODE}/30", "dev", there), ("link", "set", there, "up"), ("link", "set", "lo", "up")):
                ip("-n", name, *arguments)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine lets no test make a network: {getattr(error, 'stderr', '') or error}")
        yield name


def switch(name: str, how: str) -> None:
    """Put a network's link up or down, from inside: what is here stays as it is."""
    ip("-n", name, "link", "set", f"ft{os.getpid()}", how)


def test_a_node_whose_link_is_cut_is_missed_and_comes_back_when_it_is_mended(base, overrides, tmp_path: Path) -> None:
    """Nobody is told that packets are lost: the round ends by its time with the other, and later ones have both again."""
    if shutil.which("ip") is None:
        pytest.skip("this machine has no ip command")
    output = tmp_path / "run"
    few = ("federation.min_replies=1", "federation.timeout=45", "federation.num_rounds=500", "init.kind=weight_svd", "eval.every=500")
    with network() as name:
        sides = Sides(tmp_path, overrides, SERVER)
        nodes = [sides.node(f"node-{i}", f"client-{i}") for i in (0, 1)]
        with sides.serving():
            for i in (0, 1):
                sides.admit(nodes[i], f"client-{i}")
            with (
                sides.joining(nodes[0]),
                sides.joining(nodes[1], within=("ip", "netns", "exec", name)) as far,
                sides.submitting("cut", *base, sides.test_part, f"output={output}", *few) as (_, shown),
            ):
                assert eventually(lambda: len(failures(output)) > 2 and not failures(output)[-1], 300), shown.read_text()
                switch(name, "down")
                assert eventually(lambda: "client-1" in failures(output)[-1], 200), shown.read_text()
                switch(name, "up")
                assert eventually(lambda: "client-1" not in failures(output)[-1], 300), shown.read_text()
                assert far.poll() is None
                assert all(failed.keys() <= {"client-1"} for failed in failures(output))
    assert not left_running(tmp_path)
