"""A run goes on from its last whole checkpoint, and not at all where there is none to go on from or another process is at it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from fedsb.core.errors import RunError, UserError
from fedsb.run.folder import RunFolder
from tests.run.mortal import RUNS, Killed, Run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **facts: Any) -> None:
    """Change a checkpoint's facts as another program would, its hash included."""
    from fedsb.run.groups import digest_of

    with safe_open(path, "pt") as file:
        text = json.dumps({**json.loads(file.metadata()["facts"]), **facts})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"facts": text, "sha256": digest_of(tensors, text)})


HARMS: dict[str, Callable[[Path], object]] = {
    "bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_bytes(b""),
    "of another run": lambda path: rewrite(path, run="0" * 16),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    harm: str, stopped: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole", "init.kind=weight_svd")
    HARMS[harm](stopped / "checkpoints" / "round-0002.safetensors")
    assert run(stopped, f"resume={stopped}")["factors_sha256"] == whole["factors_sha256"]
    assert "checkpoint passed over" in caplog.text
    story = (stopped / "run.log").read_text().splitlines()
    # It is known before the log of the run that goes on is open, and stands in it too, once, in front.
    [passed] = [number for number, line in enumerate(story) if "WARNING checkpoint passed over" in line]
    [after] = [number for number, line in enumerate(story) if "INFO resumed after round 1" in line]
    assert passed < after


def test_a_run_whose_checkpoints_are_all_damaged_does_not_go_on(stopped: Path, run: Run) -> None:
    before = (stopped / "metrics.jsonl").read_text()
    flip(next((stopped / "checkpoints").glob("frozen-*")))
    with pytest.raises(RunError, match=r"no checkpoint can be used: .*round-0002.* hash differs.*round-0001"):
        run(stopped, f"resume={stopped}")
    assert (stopped / "metrics.jsonl").read_text() == before


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", *RUNS["fed_sb"], life=3)
    run(tmp_path / "run", f"resume={tmp_path / 'run'}")
    assert "no checkpoint is there yet: the run begins anew" in capsys.readouterr().out


def test_a_checkpoint_of_a_later_version_is_refused(stopped: Path, run: Run) -> None:
    rewrite(stopped / "checkpoints" / "round-0002.safetensors", format=99)
    with pytest.raises(UserError, match=r"written by a later version \(format 99, this one reads 3\); use that version$"):
        run(stopped, f"resume={stopped}")


def test_no_run_and_a_finished_run_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^resume=.*: there is no run \(config.yaml is missing\)"):
        run(tmp_path / "none", f"resume={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()
    run(tmp_path / "done", "init.kind=weight_svd")
    with pytest.raises(UserError, match=r"^resume=.*: that run has finished; begin another"):
        run(tmp_path / "done", f"resume={tmp_path / 'done'}")


def test_a_run_that_is_under_way_is_left_alone(stopped: Path, run: Run) -> None:
    with RunFolder(stopped, resumed=True).held(), pytest.raises(UserError, match=r"is under way in another process; end that one first$"):
        run(stopped, f"resume={stopped}")
