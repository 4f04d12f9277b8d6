"""The examples of scripts/federation/ and of the README say what this project's commands take, and name nothing that is not there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsb.node.file import read_file
from tests.docs.blocks import blocks_in
from tests.docs.composed import check_fedsb
from tests.flower.harness import ROOT

EXAMPLES = ROOT / "scripts" / "federation"
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yaml").read_text(encoding="utf-8"))
POD = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))["spec"]
UNIT = (EXAMPLES / "fedsb-worker@.service").read_text(encoding="utf-8")
ACROSS = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Across machines\n")[2].partition("\n### ")[0]
SKIPPED = ("&", "fedsb submit", "fedsb federation status", "fedsb federation stop", "fedsb node check")


def commands() -> Iterator[tuple[str, list[str]]]:
    """Yield the arguments of each call of ``fedsb``."""
    for name, service in COMPOSE["services"].items():
        if service["image"] == "fedsb":
            yield name, service["command"]
    for container in POD["template"]["spec"]["containers"]:
        said = " ".join(container["args"])
        yield f"pod's {container['name']}", shlex.split(said[said.find("fedsb federation") + 6 :] if "command" in container else said)
    [started] = re.findall(r"^ExecStart=\S+/fedsb (.*)$", UNIT, re.MULTILINE)
    yield "unit", shlex.split(started)
    [submitted] = re.findall(r"exec superlink fedsb (.*)$", (EXAMPLES / "compose.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    yield "compose's submit", shlex.split(submitted)


@pytest.mark.parametrize(("name", "arguments"), list(commands()))
def test_the_command_line_takes_them(name: str, arguments: list[str]) -> None:
    check_fedsb(arguments)


@pytest.mark.slow
def test_the_readme_sets_up_two_nodes_with_all_that_they_need(tmp_path: Path) -> None:
    """Its block, but for what runs until a signal comes, or on what does: who is admitted, and whose data each node has."""
    block = next(block.text for block in blocks_in(ROOT / "README.md", ACROSS) if "federation init" in block.text)
    lines = [line.partition("   #")[0].rstrip() for line in block.splitlines()]
    own = "\n".join(line for line in lines if not any(word in line.replace("&&", "") for word in SKIPPED))
    python = f'"{sys.executable}" -P'
    tools = f'set -e; fedsb() {{ {python} -m fedsb.cli "$@"; }}; python() {{ {python} "{ROOT}/${{1#../}}" "${{@:2}}"; }}\n'
    done = subprocess.run(["bash", "-c", tools + own], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False)
    assert done.returncode == 0
    trial = tmp_path / "trial"
    for ward, client in (("ward-7", "client-0"), ("ward-8", "client-1")):
        assert {path.name for path in (trial / ward).iterdir()} == {"key", "key.pub", "ca.crt", "node.yaml"}
        assert (trial / "server" / "nodes" / f"{client}.pub").read_bytes() == (trial / ward / "key.pub").read_bytes()
        said = read_file(trial / ward / "node.yaml")
        assert said.client == client
        assert (Path(said.data.path or "") / "train.jsonl").is_file()
    assert (trial / "data" / "server" / "test.jsonl").is_file()
    waiting = [shlex.split(line)[:4] for line in lines if line.endswith("&")]
    assert waiting == [["fedsb", "federation", *side] for side in (("server", "server"), ("node", "ward-7"), ("node", "ward-8"))]
    assert [line.split()[3] for line in lines if "federation stop" in line] == ["ward-7", "ward-8", "server"]


def test_worker_and_supernode_meet_at_one_door() -> None:
    said = {name: dict(pairwise(map(str, arguments))) for name, arguments in commands()}
    for one, other in (("worker", "supernode"), ("pod's worker", "pod's supernode")):
        assert said[one]["--at"] == said[other]["--worker"]
        assert said[one]["--group"] == "flower"
        assert said[other]["--worker-user"] == "fedsb"


def test_compose_names_what_it_declares() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source.startswith((".", "/")) or source in COMPOSE["volumes"]
            assert not source.startswith("../") or (EXAMPLES / source).exists()
        assert set(service.get("depends_on", [])) <= COMPOSE["services"].keys()
        if "build" in service:
            assert (EXAMPLES / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_what_the_server_ships_sees_neither_data_nor_ledger() -> None:
    services = {name: {v.split(":")[0] for v in each.get("volumes", [])} for name, each in COMPOSE["services"].items()}
    assert services["worker"] & services["supernode"] == {"door"}
    worker, supernode = ({m["name"] for m in each["volumeMounts"]} for each in POD["template"]["spec"]["containers"])
    assert worker & supernode == {"door", "scratch"}
    assert COMPOSE["services"]["worker"]["network_mode"] == "none"


def test_a_pod_mounts_what_it_has() -> None:
    spec: dict[str, Any] = POD["template"]["spec"]
    there = {volume["name"] for volume in spec["volumes"]} | {claim["metadata"]["name"] for claim in POD["volumeClaimTemplates"]}
    assert {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]} == there
