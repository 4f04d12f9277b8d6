"""One small federation, described once; its factors are known from a run without Flower."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fedsb import client_app
from fedsb.config.compose import load
from fedsb.runtime.local import LocalGrid
from fedsb.runtime.staging import stage_app
from fedsb.server_app import serve
from tests.flower.harness import command, copy_checkout, summary

TINY = (
    "model=pretrained",
    "data=files",
    "federation.num_clients=2",
    "federation.num_rounds=1",
    "federation.partition.kind=iid",
    "init.num_examples=8",
    "init.power_iterations=0",
    "rank=4",
)


@pytest.fixture(scope="session")
def base(tiny_bert: Path) -> list[str]:
    """Overrides of the small federation, all but its data and output."""
    return [*TINY, f"model.name={tiny_bert}"]


@pytest.fixture(scope="session")
def overrides(base: list[str], tiny_csv: Path) -> list[str]:
    """Overrides of the small federation, simulated, all but its output."""
    return [*base, f"data.path={tiny_csv}"]


@pytest.fixture(scope="session")
def private(overrides: list[str]) -> list[str]:
    """Overrides of the small federation under example-level privacy, all but its output."""
    return [*overrides, "privacy=example", "privacy.epsilon=8"]


@pytest.fixture(scope="session")
def expected(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the federation's final factors, from the local runtime."""
    return str(local(overrides, tmp_path_factory.mktemp("expected"))["factors_sha256"])


@pytest.fixture(scope="session")
def privately(private: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The private federation's summary, from the local runtime."""
    return local(private, tmp_path_factory.mktemp("privately"))


def local(overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run a federation in this process and return its summary."""
    run_config = {"overrides": shlex.join(overrides), "output": str(folder / "run")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDSB_HOME", str(folder / "home"))
        serve(load(overrides), LocalGrid.simulation(client_app.app, run_config), folder / "run")
    return summary(folder / "run")


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app as it is submitted."""
    return stage_app(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "a checkout.d")
    command(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and borrows its dependencies from this one's environment."""
    environment = tmp_path_factory.mktemp("clean") / "a venv"
    command(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    [packages] = environment.glob("lib/python*/site-packages")
    # Path files inside a borrowed folder are not read, so an editable install of this project stays out of sight.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    return python


@pytest.fixture(autouse=True)
def _no_folder_of_ours_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    # A path variable of the developer's would hide what these tests are about.
    if "PYTHONPATH" in os.environ:
        monkeypatch.delenv("PYTHONPATH")
