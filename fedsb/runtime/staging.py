"""A copy of the app for ``flwr run``, from wherever this package was imported.

Flower wants a folder whose name holds letters, digits and hyphens only, with a ``pyproject.toml``. A checkout may be called anything, and
an installed wheel has no ``pyproject.toml``.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from fedsb.runtime.fab import app_root

PACKAGES = ("fedsb", "strategies", "clients")
NAME = "fedsb"
_BESIDE = ("conf", "pyproject.toml", "README.md", "LICENSE", "scripts/build_backend.py")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc")

# Static and empty dependencies: the run uses the environment in which Flower runs, and there is nothing to build.
_PYPROJECT = """\
[project]
name = "{name}"
version = "{version}"
dependencies = []

[tool.uv]
package = false

[tool.flwr.app]
publisher = "fedsb"

[tool.flwr.app.components]
serverapp = "fedsb.server_app:app"
clientapp = "fedsb.client_app:app"

[tool.flwr.app.config]
overrides = ""
"""


def stage_app(parent: Path) -> Path:
    """Copy the app into a fresh folder in ``parent`` and return that folder."""
    target = parent / NAME
    target.mkdir(parents=True)
    for package in PACKAGES:
        shutil.copytree(package_folder(package), target / package, ignore=_IGNORED)
    if (app_root() / "pyproject.toml").is_file():
        for name in _BESIDE:
            _copy(app_root() / name, target / name)
    else:
        (target / "pyproject.toml").write_text(_PYPROJECT.format(name=NAME, version=version(NAME)), encoding="utf-8")
    return target


def package_folder(package: str) -> Path:
    """Return where the sources of a package of this project lie.

    Raises:
        FileNotFoundError: nowhere.
    """
    beside = app_root() / package
    if beside.is_dir():
        return beside
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package '{package}' is neither beside {app_root()} nor importable; install fedsb again")
    return Path(next(iter(spec.submodule_search_locations)))


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=_IGNORED)
    elif source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
