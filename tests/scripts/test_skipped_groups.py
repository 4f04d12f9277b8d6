"""A group of tests that was skipped whole makes the run fail, by one process and by several."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = "import pytest\n\n\n@pytest.mark.skip(reason='none here')\ndef test_not():\n    pass\n"
WHOLE_FILE = "import pytest\n\npytest.skip('none here', allow_module_level=True)\n"
SLOW = "import pytest\n\n\n@pytest.mark.slow\n@pytest.mark.skip(reason='none here')\ndef test_not_slowly():\n    pass\n"
RAN = "def test_ran():\n    pass\n"

pytestmark = pytest.mark.parametrize("processes", [[], ["-p", "xdist.plugin", "-n", "2", "--dist", "worksteal"]], ids=["one", "several"])


def outcome(folder: Path, files: dict[str, str], processes: list[str]) -> tuple[int, str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: slow\n    gpu: gpu\n")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    plugin = ["-p", "scripts.skipped_groups", "--fail-if-group-skipped", "-p", "no:cacheprovider"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *processes, *plugin, str(folder)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    ("files", "group"),
    [
        ({"tests/data/test_a.py": SKIPPED, "tests/test_b.py": RAN}, "tests/data"),
        ({"tests/data/test_a.py": WHOLE_FILE, "tests/test_b.py": RAN}, "tests/data"),
        ({"tests/data/test_a.py": RAN, "tests/data/test_b.py": SLOW, "tests/test_c.py": RAN}, "slow"),
    ],
    ids=["a folder", "a folder whose file skips itself", "a marker"],
)
def test_a_group_that_was_skipped_whole_is_a_failure(tmp_path: Path, files: dict[str, str], group: str, processes: list[str]) -> None:
    status, said = outcome(tmp_path, files, processes)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert f"FAILED group '{group}': all its 1 tests were skipped" in said


def test_a_group_of_which_one_test_ran_is_none(tmp_path: Path, processes: list[str]) -> None:
    status, said = outcome(tmp_path, {"tests/data/test_a.py": SKIPPED + RAN, "tests/test_b.py": RAN}, processes)
    assert status == pytest.ExitCode.OK
    assert "FAILED" not in said
