"""Real Flower for tests: an app folder, a federation of SuperNodes, and the processes that belong to a Flower home."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from fedsb.runtime.connection import flower_environment, script
from fedsb.runtime.flower import LocalFlower, free_port
from fedsb.runtime.processes import ProcessTree
from tests.flower.forwarder import Wire, wired

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fedsb", "strategies", "clients", "conf", "scripts", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def copy_checkout(target: Path) -> Path:
    """Copy what git would hold of the project, as far as packaging needs it."""
    target.mkdir(parents=True)
    for name in (*SOURCES, ".gitignore", *(path.name for path in ROOT.glob("requirements*.txt"))):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target / name)
    return target


def summary(output: Path) -> dict[str, Any]:
    """Read what a run left behind."""
    loaded: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return loaded


def command(*arguments: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(arguments, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_here(overrides: Sequence[str], *, python: str = sys.executable, folder: Path = ROOT, home: Path) -> None:
    """Run a federation by ``fedsb run`` in a process of its own."""
    environment = flower_environment(home) | {"FEDSB_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "fedsb.cli", "run", *overrides]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def belonging_to(home: Path) -> list[psutil.Process]:
    """Return the living processes that were started with this Flower home, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def eventually(true: Callable[[], object], seconds: float = 60.0, pause: float = 0.2) -> bool:
    """Wait until something is true; look again after a ``pause``, a long one where looking takes a core."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


@contextmanager
def submitting(
    name: str, overrides: Sequence[str], *, environment: Mapping[str, str], folder: Path
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run ``fedsb submit`` for the length of a block; yield it, its errors in a pipe, and the file to which its output goes."""
    command = [sys.executable, "-m", "fedsb.cli", "submit", name, *overrides]
    folder.mkdir()
    shown = folder / "out"
    with (
        shown.open("w", encoding="utf-8") as out,
        subprocess.Popen(
            command, cwd=folder, env={**environment, "PYTHONPATH": str(ROOT)}, text=True, stdout=out, stderr=subprocess.PIPE
        ) as process,
    ):
        try:
            yield process, shown
        finally:
            process.kill()


@contextmanager
def deployment(folder: Path, node_configs: Sequence[Mapping[str, str]], wires: list[Wire] | None = None) -> Iterator[LocalFlower]:
    """Start a SuperLink and one SuperNode for each node configuration, every one with its own Flower and fedsb homes.

    Args:
        folder: of all of them.
        node_configs: as ``--node-config`` has them.
        wires: takes one for each node, over which it reaches the SuperLink by TLS; None: they have none, and no TLS.
    """
    with ExitStack() as stack:
        superlink = LocalFlower(folder / "superlink", simulation=False, environment={"FEDSB_HOME": str(folder / "server")})
        flower = stack.enter_context(superlink)
        for number, config in enumerate(node_configs):
            home = folder / f"node-{number}"
            home.mkdir(parents=True)
            link = ["--insecure", "--superlink", flower.address]
            if wires is not None:
                wires.append(wire := stack.enter_context(wired(flower.address, home / "wire")))
                link = ["--root-certificates", str(wire.authority), "--superlink", wire.outside.address]
            stack.callback(_supernode(link, home, config).end)
        yield flower


def _supernode(link: Sequence[str], home: Path, config: Mapping[str, str]) -> ProcessTree:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    command = [script("flower-supernode"), *link, "--port", str(free_port()), "--node-config", pairs]
    environment = flower_environment(home) | {"FEDSB_HOME": str(home / "fedsb"), "HF_HUB_OFFLINE": "1"}
    return ProcessTree(command, environment=environment, folder=home, log=home / "supernode.log")
