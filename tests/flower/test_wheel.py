"""The built wheel, installed away from the checkout: it brings its configuration and can submit itself."""

from __future__ import annotations

import zipfile

import pytest

from fedsb.run.schema_files import SCHEMAS
from tests.flower.harness import ROOT, command, run_here, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

RAY_TASK = """
import os, sys
os.environ["RAY_RUNTIME_ENV_HOOK"] = "fedsb.runtime.fab.quote_interpreter"
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"GREETING": "hello"}})
assert ray.get(ray.remote(lambda: (sys.executable, os.environ["GREETING"])).remote(), timeout=100) == (sys.executable, "hello")
ray.shutdown()
"""


def test_the_wheel_holds_packages_and_configuration_and_names_its_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fedsb", "strategies", "clients"}
    shipped = {name.removeprefix("fedsb/conf/") for name in names if name.startswith("fedsb/conf/")}
    assert shipped == {str(path.relative_to(ROOT / "conf")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name for name in names if "/schemas/" in name} == {f"fedsb/run/schemas/{name}.json" for name in SCHEMAS}
    page = {name.removeprefix("fedsb/report/page/") for name in names if name.startswith("fedsb/report/page/")}
    assert page >= {"page.html", "page.css", "page.js", "library/plotly-basic.min.js", "library/LICENSE", "library/VERSION"}
    assert "Requires-Dist: torch" in metadata
    assert "Provides-Extra: demo" in metadata


def test_the_wheel_runs_from_another_folder(python, overrides, expected, tmp_path):
    run_here([*overrides, "output=here"], python=str(python), folder=tmp_path, home=tmp_path / "home")
    assert summary(tmp_path / "here")["factors_sha256"] == expected


def test_ray_starts_workers_from_an_environment_whose_path_holds_a_space(python):
    assert " " in str(python)
    command(str(python), "-c", RAY_TASK)
