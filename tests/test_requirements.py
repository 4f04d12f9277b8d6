"""Whoever installs without constraints gets what is tested: the requirements end where the tested series end."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import Specifier
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))
PACKAGES = ("fedsb", "strategies", "clients")
# What tells a reader to install a version by hand.
TELLING = [*(ROOT / "docs").glob("*.md"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "fedsb").rglob("*.py")]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in TELLING if "pip install" in path.read_text("utf-8")),
)


def read(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@cache
def pinned() -> dict[str, Version]:
    """Return the version of each package in ``constraints.txt``, by its canonical name."""
    return {canonicalize_name(line.name): Version(str(line.specifier).removeprefix("==")) for line in read("constraints.txt")}


def next_series(version: Version) -> Version:
    """Return where the next minor series begins. For 0.x that is the next one that may break, as for all others a new one that may."""
    return Version(f"{version.major}.{version.minor + 1}")


def ends_before(clause: Specifier, limit: Version) -> bool:
    """Whether a clause alone leaves out every version from ``limit`` on."""
    if clause.operator == "<":
        return Version(clause.version) <= limit
    return clause.operator == "==" and not clause.version.endswith(".*") and Version(clause.version) < limit


def within_tested(requirement: Requirement, version: Version) -> bool:
    """Whether a requirement admits the tested version, and nothing of a later series."""
    return version in requirement.specifier and any(ends_before(clause, next_series(version)) for clause in requirement.specifier)


@pytest.mark.parametrize(
    ("line", "version", "right"),
    [
        ("a>=1.2,<1.5", "1.4.9", True),
        ("a>=1.2,<1.4.10", "1.4.9", True),
        ("a==1.4.9", "1.4.9", True),
        ("a>=0.2,<0.7", "0.6.1", True),
        ("a>=3,<84.3", "84.2.1", True),
        ("a>=1.2,<1.6", "1.4.9", False),  # 1.5 was not tested
        ("a>=1.2,<2", "1.4.9", False),
        ("a>=0.2,<1", "0.6.1", False),
        ("a>=1.2", "1.4.9", False),
        ("a", "1.4.9", False),
        ("a~=1.4", "1.4.9", False),  # to 2.0
        ("a>=1.2,<1.4", "1.4.9", False),  # not what was tested
        ("a>=1.2,!=1.5,<=1.6", "1.4.9", False),
        ("a==1.4.8", "1.4.9", False),
    ],
)
def test_the_law_itself(line: str, version: str, right: bool) -> None:
    assert within_tested(Requirement(line), Version(version)) is right


@pytest.mark.parametrize("name", FILES)
def test_requirements_end_with_the_tested_series(name: str) -> None:
    requirements = read(name)
    assert requirements
    assert [str(line) for line in requirements if not within_tested(line, pinned()[canonicalize_name(line.name)])] == []


def test_constraints_are_exact_and_public() -> None:
    lines = read("constraints.txt")
    assert [str(line) for line in lines if not re.fullmatch(r"==[^*,+]+", str(line.specifier))] == []
    assert len(pinned()) == len(lines)


def test_what_the_sources_import_is_required() -> None:
    """A package that comes by way of another one has the other's bounds, which are not those that were tested."""
    required = {canonicalize_name(line.name) for name in ("requirements.txt", "requirements-llm.txt") for line in read(name)}
    for name in sorted(required):
        # What a requirement pins exactly (pydantic's core) is as closed as itself.
        lines = [Requirement(line) for line in requires(name) or ()]
        required |= {canonicalize_name(line.name) for line in lines if any(clause.operator == "==" for clause in line.specifier)}
    # What need not be installed is called as its module.
    required |= {canonicalize_name(line.name) for line in read("requirements-quant.txt")}
    own = {*PACKAGES, *sys.stdlib_module_names}
    homes = packages_distributions()
    modules = {module for package in PACKAGES for path in (ROOT / package).rglob("*.py") for module in imported(path)} - own
    assert {"torch", "flwr", "numpy"} <= modules
    assert [module for module in sorted(modules) if required.isdisjoint(map(canonicalize_name, homes.get(module, [module])))] == []


def imported(path: Path) -> set[str]:
    """Return the outermost names of what a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}}


@pytest.mark.parametrize("page", PAGES)
def test_versions_to_install_by_hand_are_the_tested_ones(page: str) -> None:
    lines = re.findall(r"pip install [^`'\n]*", (ROOT / page).read_text(encoding="utf-8"))
    named = [found for line in lines for found in re.findall(r"([\w.-]+)==([\d.]+\d)", line)]
    assert [(name, version) for name, version in named if pinned()[canonicalize_name(name)] != Version(version)] == []
