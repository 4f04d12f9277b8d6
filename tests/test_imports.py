"""Imports point one way: read off the source, so that nothing has to run."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fedsb", "strategies", "clients")
CLIENT_ROOTS = {"fedsb/client_app.py", "fedsb/client_job.py", "fedsb/client_stack.py"}
WIRE = {"fedsb/arrays.py", "fedsb/messages.py", "fedsb/byte_counts.py"}
COMMANDS = {"fedsb/cli.py", "fedsb/commands/run.py"}
COMPOSITION_ROOTS = {"fedsb/server_app.py", *CLIENT_ROOTS, *COMMANDS, "fedsb/starting.py", "fedsb/preparing.py"}
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
            found.add(node.module or "")
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


@pytest.mark.parametrize("source", SOURCES)
def test_flower_stays_at_the_edge(source: str) -> None:
    at_the_edge = source.startswith(("strategies/", "clients/", "fedsb/runtime/")) or source in COMPOSITION_ROOTS | WIRE
    assert at_the_edge or "flwr" not in tops(source)


@pytest.mark.parametrize("source", SOURCES)
def test_hydra_composes_and_nothing_else_does(source: str) -> None:
    assert source in ("fedsb/config.py", "fedsb/overrides.py", "fedsb/commands/run.py") or not {"hydra", "omegaconf"} & tops(source)


@pytest.mark.parametrize("source", SOURCES)
def test_opacus_stays_with_the_clients(source: str) -> None:
    assert source.startswith(("clients/", "fedsb/privacy/")) or "opacus" not in tops(source)


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith("fedsb/adapters/") or s == "fedsb/state.py"])
def test_adapters_and_states_know_torch_and_little_else(source: str) -> None:
    assert not tops(source) & {"flwr", "opacus", "hydra", "omegaconf", "ray", "datasets"}


@pytest.mark.parametrize("source", SOURCES)
def test_no_file_is_long(source: str) -> None:
    assert len((ROOT / source).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_private_setting_of_flower_is_touched_in_one_file() -> None:
    users = [source for source in SOURCES if "flwr.supercore.task_identity" in imported(source)]
    assert users == ["fedsb/runtime/grid.py"]


def test_nothing_on_the_wire_or_on_a_disk_is_pickled() -> None:
    """A network's structure goes to the actors of its own run by Ray, which pickles everything; no other file may."""
    pickling = [source for source in SOURCES if tops(source) & {"pickle", "cloudpickle", "dill", "joblib"}]
    assert pickling == ["fedsb/runtime/sharing.py"]
