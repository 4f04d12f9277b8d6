"""A script starts from any folder, as its help says: what it imports lies beside it or is installed."""

from __future__ import annotations

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The contestants of a benchmark are started by it, with the project's root on their path.
SCRIPTS = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").rglob("*.py") if "contest" not in path.parts)
INSTALLED = {"fedsb", "strategies", "clients"}


def imported(script: Path) -> set[str]:
    """Return the first names of what a script imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_what_a_script_imports_lies_beside_it_or_is_installed(script: Path) -> None:
    beside = folders_of(ROOT / script)
    elsewhere = [name for name in sorted(imported(script) - INSTALLED) if not found(name, beside)]
    assert elsewhere == []


def folders_of(script: Path) -> list[str]:
    """Return where Python looks first: beside the script, and for a part of a package that is not started also beside the package."""
    part = (script.parent / "__init__.py").exists() and "__main__" not in script.read_text(encoding="utf-8")
    return [str(script.parent), str(script.parent.parent)] if part else [str(script.parent)]


def found(name: str, beside: list[str]) -> bool:
    # The tests put the root on the path, where Python does not look when a script is started.
    path = [*beside, *(folder for folder in sys.path if Path(folder).resolve() != ROOT)]
    return name in sys.builtin_module_names or PathFinder.find_spec(name, path) is not None
