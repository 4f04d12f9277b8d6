"""A Flower app under ``flwr run`` as a contestant: relays ``ready``, ``done`` and the word for the next round through two pipes.

Run as ``python -m contest.flower_rounds APP WORKLOAD``; APP is a package beside this file whose ServerApp finds the pipes' paths in
``BENCH_SAID`` and ``BENCH_HEARD``. Needs flwr[simulation] and what the app needs; of this project it takes the SuperLink of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsb.runtime.flower import LocalFlower

PYPROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

[tool.flwr.app.config]
overrides = ""
"""
# What an app reads in ``overrides``.
OVERRIDES: dict[str, Callable[[str, dict[str, Any]], list[str]]] = {
    "vanilla_flower": lambda path, work: [path],
    "ours_flower": lambda path, work: list(work["overrides"]),
}


def main() -> None:
    """Run the app, a round for each line that comes in."""
    package, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        app = folder / "app"
        shutil.copytree(Path(__file__).resolve().parent / package, app / package, ignore=shutil.ignore_patterns("__pycache__"))
        (app / "pyproject.toml").write_text(PYPROJECT.format(name=package.replace("_", "-"), package=package))
        said, heard = folder / "said", folder / "heard"
        os.mkfifo(said)
        os.mkfifo(heard)
        with LocalFlower(folder / "home", environment={"BENCH_SAID": str(said), "BENCH_HEARD": str(heard)}) as flower:
            run = flower.submit(app, OVERRIDES[package](sys.argv[2], work), num_supernodes=len(work["clients"]))
            threading.Thread(target=relay, args=(said,), daemon=True).start()
            for line in sys.stdin:
                heard.write_text(line)
            flower.wait(run, timeout=30)


def relay(said: Path) -> None:
    """Say what the ServerApp says."""
    while True:
        print(said.read_text(), end="", flush=True)


if __name__ == "__main__":
    main()
