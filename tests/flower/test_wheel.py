"""The built wheel, installed away from the checkout: it brings its configuration and can submit itself."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fedsb.runtime.flower import LocalFlower
from tests.flower.harness import ROOT, copy_checkout, run_here, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


RAY_TASK = """
import os, sys
os.environ["RAY_RUNTIME_ENV_HOOK"] = "fedsb.runtime.fab.quote_interpreter"
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"GREETING": "hello"}})
assert ray.get(ray.remote(lambda: (sys.executable, os.environ["GREETING"])).remote(), timeout=100) == (sys.executable, "hello")
ray.shutdown()
"""


def command(*arguments: str) -> None:
    done = subprocess.run(arguments, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_checkout(folder / "a checkout.d")
    command(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source))
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
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


def test_the_wheel_holds_packages_and_configuration_and_names_its_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fedsb", "strategies", "clients"}
    shipped = {name.removeprefix("fedsb/conf/") for name in names if name.startswith("fedsb/conf/")}
    assert shipped == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert "Requires-Dist: torch" in metadata
    assert "Provides-Extra: demo" in metadata


def test_the_wheel_runs_from_another_folder(python, overrides, expected, tmp_path):
    run_here([*overrides, "output=here"], python=str(python), folder=tmp_path, home=tmp_path / "home")
    assert summary(tmp_path / "here")["factors_sha256"] == expected


def test_the_wheel_submits_itself_and_simulated_clients_run_that(python, flower_in, overrides, expected, tmp_path):
    code = "import sys; from pathlib import Path; from fedsb.runtime.staging import stage_app; stage_app(Path(sys.argv[1]))"
    command(str(python), "-c", code, str(tmp_path / "app"))
    trap = tmp_path / "trap"
    for package in ("fedsb", "strategies", "clients"):
        (trap / package).mkdir(parents=True)
        (trap / package / "__init__.py").write_text("raise SystemError('this is not what was submitted')\n")
    flower: LocalFlower = flower_in(trap)
    run_id = flower.submit(tmp_path / "app" / "fedsb", [*overrides, "output=relative"])
    assert flower.wait(run_id, 200).state == "completed", flower.log_file.read_text()
    # Relative paths still mean the daemon's folder, although the run works inside the bundle.
    assert summary(trap / "relative")["factors_sha256"] == expected


def test_ray_starts_workers_from_an_environment_whose_path_holds_a_space(python):
    assert " " in str(python)
    command(str(python), "-c", RAY_TASK)
