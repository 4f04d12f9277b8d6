"""Build backend: setuptools in a checkout, nothing to fetch in a Flower app bundle.

``flwr run`` unpacks the app and has uv synchronise its dependencies into a fresh environment that goes before the caller's on the import
path. A second torch would be fetched and would hide the installed one. The bundle carries no ``requirements*.txt`` (Flower ships no text
files), so there the project has no dependencies, and answering that must need neither setuptools nor a network.
"""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path
from typing import Any

Settings = dict[str, Any] | None


def _is_checkout() -> bool:
    return Path("requirements.txt").is_file()


def _development() -> list[str]:
    return Path("requirements-dev.txt").read_text(encoding="utf-8").splitlines()


def _setuptools() -> Any:
    return importlib.import_module("setuptools.build_meta")


def _write_bare_metadata(metadata_directory: str) -> str:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    name = f"{project['name']}-{project['version']}.dist-info"
    folder = Path(metadata_directory) / name
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.2\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8")
    return name


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what the frontend has to install before it builds."""
    return [line for line in _development() if line.startswith("setuptools")] if _is_checkout() else []


get_requires_for_build_editable = get_requires_for_build_wheel
get_requires_for_build_sdist = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the ``.dist-info`` folder of a wheel and return its name."""
    if not _is_checkout():
        return _write_bare_metadata(metadata_directory)
    return str(_setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    """Write the ``.dist-info`` folder of an editable install and return its name."""
    if not _is_checkout():
        return _write_bare_metadata(metadata_directory)
    return str(_setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the wheel and return its name."""
    return str(_setuptools().build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the editable wheel and return its name."""
    return str(_setuptools().build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """Build the source archive and return its name."""
    return str(_setuptools().build_sdist(sdist_directory, config_settings))
