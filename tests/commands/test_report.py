"""What ``fedsb report`` says beside the files that it writes."""

from __future__ import annotations

from pathlib import Path

from tests.commands.calls import Call
from tests.report.pages import make_folder


def test_a_run_that_is_left_out_is_told_of_on_the_screen_too(call: Call, tmp_path: Path) -> None:
    for name in "abc":
        make_folder(tmp_path / "sweep" / name, "fed_sb", ord(name))
    (tmp_path / "sweep" / "b" / "config.yaml").write_text("a: [")
    status, out, err = call("report", str(tmp_path / "sweep"))
    assert status == 0
    assert out.split() == [str(tmp_path / "sweep" / f"comparison.{kind}") for kind in ("md", "html")]
    [line] = err.splitlines()
    assert "b' holds a config.yaml that cannot be read" in line
    assert line.endswith("left out")
