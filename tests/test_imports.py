"""Imports point one way: read off the source, so that nothing has to run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsb", "strategies", "clients")
# From the top down: what is above imports what is below.
ROOMS = (
    *("cli", "commands", "server_app", "client_stack", "client_app", "federation", "resident"),
    *(
        "sweep",
        "cost",
        "app",
        "report",
        "trackers",
        "runtime",
        "stack",
        "node",
        "run",
        "models",
        "tasks",
        "wire",
        "privacy",
        "data",
        "config",
        "adapters",
        "secure",
        "core",
    ),
)
ANSWERS = {"fedsb/app/answering.py", "fedsb/app/asked.py", "fedsb/app/secure_desk.py"}  # what a message asks for, and how it is answered
CLIENT_ROOTS = {"fedsb/client_app.py", "fedsb/client_stack.py", "fedsb/app/answers.py", "fedsb/app/client_job.py"}
COMMANDS = {"fedsb/cli.py", "fedsb/commands/run.py"}
COMPOSITION_ROOTS = {"fedsb/server_app.py", *CLIENT_ROOTS, *COMMANDS, "fedsb/app/first_factors.py", "fedsb/app/prepare.py"}
SOURCES = sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MOST_LINES = 300


@cache
def imported(source: str) -> set[str]:
    """Return the dotted names of all modules that a file imports anywhere, functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(source: str) -> set[str]:
    return {name.split(".")[0] for name in imported(source)}


@pytest.mark.parametrize("source", SOURCES)
def test_packages_import_one_way(source: str) -> None:
    package = source.split("/")[0]
    used = tops(source) & set(PACKAGES)
    if package == "fedsb":
        assert used <= ({*PACKAGES} if source in COMPOSITION_ROOTS else {"fedsb"})
    else:
        assert used <= {"fedsb", package}


def room_of(path: str) -> str:
    """Return the room of a file ``fedsb/…``; nothing of the package itself."""
    return path.removeprefix("fedsb").lstrip("/").split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("fedsb/") and source != "fedsb/__init__.py"])
def test_rooms_import_from_below(source: str) -> None:
    used = {room_of(name.replace(".", "/")) for name in imported(source) if name.split(".")[0] == "fedsb"} - {""}
    below = ROOMS[ROOMS.index(room_of(source)) :]
    assert used <= set(below)


@pytest.mark.parametrize("room", [room for room in ROOMS if not (ROOT / f"fedsb/{room}.py").exists()])
def test_a_room_says_what_it_is_for(room: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / "fedsb" / room / "__init__.py").read_text(encoding="utf-8")))
    assert said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_flower_stays_at_the_edge(source: str) -> None:
    at_the_edge = (
        source.startswith(("strategies/", "clients/", "fedsb/runtime/", "fedsb/wire/", "fedsb/resident/"))
        or source in COMPOSITION_ROOTS | ANSWERS
    )
    assert at_the_edge or "flwr" not in tops(source)


@pytest.mark.parametrize("source", SOURCES)
def test_hydra_composes_and_nothing_else_does(source: str) -> None:
    assert source.startswith("fedsb/config/") or source == "fedsb/commands/run.py" or not {"hydra", "omegaconf"} & tops(source)


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith(("fedsb/adapters/", "fedsb/core/"))])
def test_adapters_and_states_know_torch_and_little_else(source: str) -> None:
    assert not tops(source) & {"flwr", "opacus", "hydra", "omegaconf", "ray", "datasets"}


def test_no_file_is_long() -> None:
    files = [*SOURCES, *(str(path.relative_to(ROOT)) for folder in ("tests", "scripts") for path in (ROOT / folder).rglob("*.py"))]
    lengths = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {file: length for file, length in lengths.items() if length > MOST_LINES}


def test_the_private_setting_of_flower_is_touched_in_one_file() -> None:
    users = [source for source in SOURCES if "flwr.supercore.task_identity" in imported(source)]
    assert users == ["fedsb/runtime/grid.py"]


def test_nothing_on_the_wire_or_on_a_disk_is_pickled() -> None:
    """A network's structure goes to the actors of its own run by Ray, which pickles everything; no other file may."""
    pickling = [source for source in SOURCES if tops(source) & {"pickle", "cloudpickle", "dill", "joblib"}]
    assert pickling == ["fedsb/runtime/sharing.py"]
