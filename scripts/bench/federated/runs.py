"""Runs on a field, round by round: seconds, and the CPU time that the nodes' side took between two lines of a run's file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from fedsb.runtime.staging import stage_app

from .field import CLIENTS, Field, Nodes

LOOK_S = 0.02
ECHO = """\
[project]
name = "echo"
version = "1.0.0"
dependencies = []
[tool.uv]
package = false
[tool.flwr.app]
publisher = "fedsb"
[tool.flwr.app.components]
serverapp = "echo:server"
clientapp = "echo:client"
[tool.flwr.app.config]
overrides = ""
"""


class Round(NamedTuple):
    """What one round took: seconds between its record and the one before, and CPU seconds of the nodes, a node."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Apps:
    """The folders that are submitted."""

    fedsb: Path
    echo: Path
    idle: Path


def made(folder: Path) -> Apps:
    """Make the three apps."""
    here, echo = Path(__file__).parent, folder / "echo"
    echo.mkdir(parents=True)
    shutil.copyfile(here / "echo.py", echo / "echo.py")
    (echo / "pyproject.toml").write_text(ECHO, encoding="utf-8")
    idle = stage_app(folder / "idle")
    for name, under in (("idle.py", "idle_bench.py"), ("echo.py", "echo.py")):
        shutil.copyfile(here / name, idle / "fedsb" / under)
    project = idle / "pyproject.toml"
    project.write_text(project.read_text(encoding="utf-8").replace("fedsb.server_app:app", "fedsb.idle_bench:app"), encoding="utf-8")
    return Apps(stage_app(folder / "own"), echo, idle)


def run(ground: Field, online: Nodes, app: Path, overrides: Sequence[str], lines: Path) -> list[Round]:
    """Run an app and return its rounds, the first line of its file aside, which says that all is there.

    Raises:
        RuntimeError: the run failed.
    """
    flower = ground.connection
    with marked(lines, online) as marks:
        number = flower.submit(app, overrides)
        status = flower.wait(number, timeout=1800.0)
        time.sleep(5 * LOOK_S)
    if status.state != "completed":
        raise RuntimeError(f"the run of {app} is {status.state}: {status.details}; see {ground.folder}/server/link.log")
    return [Round(after[0] - before[0], (after[1] - before[1]) / len(CLIENTS)) for before, after in pairwise(marks)]


@contextmanager
def marked(lines: Path, online: Nodes) -> Iterator[list[tuple[float, float]]]:
    """Yield the time and the nodes' CPU seconds at each new line of a file."""
    marks: list[tuple[float, float]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_S):
            count = lines.read_bytes().count(b"\n") if lines.exists() else 0
            if count > len(marks):
                marks.append((time.monotonic(), online.cpu_s()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield marks
    finally:
        over.set()
        thread.join()


def echoed(ground: Field, online: Nodes, apps: Apps, values: int, rounds: int, name: str, wait: str = "looking") -> list[Round]:
    """Return rounds of Flower's own echo of so many float32 values; ``wait`` is a key of ``echo.WAITS``."""
    out = ground.folder / f"{name}.jsonl"
    said = [f"values={values}", f"rounds={rounds}", f"nodes={len(CLIENTS)}", f"out={out}", f"wait={wait}"]
    return run(ground, online, apps.echo, said, out)


def idled(ground: Field, online: Nodes, apps: Apps, overrides: Sequence[str], rounds: int, name: str) -> list[Round]:
    """Return rounds of a message that asks for nothing but a description of the node."""
    out = ground.folder / f"{name}.jsonl"
    said = [f"idle_out={out}", f"idle_rounds={rounds}", f"idle_nodes={len(CLIENTS)}", *overrides]
    return run(ground, online, apps.idle, said, out)


def trained(ground: Field, online: Nodes, apps: Apps, overrides: Sequence[str], rounds: int, name: str) -> tuple[list[Round], Path]:
    """Return the rounds of a federation between its first and its last, which is evaluated, and its folder."""
    output = ground.folder / name
    found = run(ground, online, apps.fedsb, [*overrides, f"federation.num_rounds={rounds}", f"output={output}"], output / "metrics.jsonl")
    return found[1:-1], output


def payload(output: Path) -> int:
    """Return how many float32 values a client sends in a round."""
    record = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[2])
    return int(record["payload_up"]) // (4 * len(CLIENTS))


def computed(output: Path, overrides: Sequence[str]) -> list[Round]:
    """Run the same federation in one process, and return what the clients of its rounds compute, the first and the last aside.

    Seconds are those that clients would take that share the cores without loss, and CPU seconds a client; the server's are in neither.
    """
    lines = output.with_suffix(".jsonl")
    command = [sys.executable, "-P", str(Path(__file__).with_name("counted_run.py")), str(lines), *overrides, f"output={output}"]
    subprocess.run([*command, "runtime=local", "runtime.stack=1"], check=True, stdout=subprocess.DEVNULL)
    said = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    rounds = [said[begin : begin + len(CLIENTS)] for begin in range(0, len(said), len(CLIENTS))][1:-1]
    cores = min(len(CLIENTS), os.cpu_count() or 1)
    return [Round(sum(each["wall_s"] for each in one) / cores, fmean(each["cpu_s"] for each in one)) for one in rounds]


def factors(output: Path) -> str:
    """Return the hash of a run's factors."""
    return str(json.loads((output / "summary.json").read_text(encoding="utf-8"))["factors_sha256"])
