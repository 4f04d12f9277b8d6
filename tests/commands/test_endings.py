"""What ends a run before its time: a full disk, SIGTERM, a home that can't be written. One line, nothing lost, and how to go on."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
from safetensors import SafetensorError

import fedsb.config.compose
from fedsb.cli import main
from fedsb.core.disk import is_full, reason_of
from fedsb.core.errors import RunError
from fedsb.run.story import ending_in_one_line

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run a command in this process, in an empty folder; return its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(arguments)
        return int(done.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def small(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    """Many short rounds on a tiny model."""
    return [
        "model=pretrained", f"model.name={tiny_bert}", "data=files", f"data.path={tiny_csv}", "device=cpu", "rank=2", "progress=lines",
        "plots=false", "federation.num_clients=2", "federation.num_rounds=3", "federation.partition.kind=iid", "train.local_steps=1",
        "train.max_length=8", "init.kind=random",
    ]  # fmt: skip


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more into a file, as a full disk does.

    Python's own cache of bytecode is left out: it would keep what was cut off, and read it again later.
    """
    before, unwritten = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = unwritten


def test_a_disk_that_refuses_is_one_line_and_the_run_goes_on_later(call: Call, small: list[str], tmp_path: Path) -> None:
    with files_no_larger_than(5000):
        status, _, err = call("run", *small, "output=run")
    assert status == 1
    (line,) = err.splitlines()
    assert line.startswith("error: the run stopped: file too large")
    assert line.endswith(f"; mend that and go on with: fedsb run resume={tmp_path}/run")
    assert "the run stopped: " not in (tmp_path / "run" / "config.yaml").read_text()
    assert call("run", "resume=run")[0] == 0
    told = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    for part in (
        "INFO method fed_sb, rank 2, start random",
        " INFO goes on with the run in ",
        " INFO round 3/3  loss ",
        " INFO finished: ",
    ):
        assert part in told


def test_what_the_system_says_is_read_out_of_every_error(tmp_path: Path) -> None:
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert reason_of(full) == "no space left on device"
    assert is_full(full)
    assert not is_full(PermissionError(13, "Permission denied", "x"))
    assert reason_of(PermissionError(13, "Permission denied", "x")) == "permission denied (x)"
    assert reason_of(SafetensorError("header too large")) == reason_of(TimeoutError("late")) == ""
    with (
        pytest.raises(RunError, match=r"^no space left on device \(in .*\); free some and begin the run again$"),
        ending_in_one_line(tmp_path),
    ):
        raise full
    with pytest.raises(TimeoutError, match=r"^late$"), ending_in_one_line(tmp_path):
        raise TimeoutError("late")


# A signal may fall between the opening of a file and its `with`.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_ends_it_as_ctrl_c_does(call: Call, small: list[str], tmp_path: Path) -> None:
    def terminate() -> None:
        while not list(tmp_path.glob("run/checkpoints/round-0002*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    status, _, err = call("run", *small, "federation.num_rounds=20", "output=run")
    assert status == 143
    assert err.splitlines() == [f"ended by SIGTERM; go on with: fedsb run resume={tmp_path}/run"]
    assert "ERROR ended by SIGTERM; go on with: " in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert call("run", "resume=run")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 20


@pytest.mark.parametrize("home", ["/proc/none", "taken/home"])
def test_a_home_that_cannot_be_written_is_one_line_where_it_is_needed(
    home: str, call: Call, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("FEDSB_HOME", home)
    status, _, err = call("run", *small, "output=run")
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith(f"error: FEDSB_HOME={home}: ")
    assert call("run", *small, "method=fedavg_lora", "federation.num_rounds=1", "output=run")[0] == 0


class Standing(datetime):
    """A clock that stands still, as for two starts in one second."""

    @classmethod
    def now(cls, tz: object = None) -> Standing:
        return cls(2026, 1, 2, 3, 4, 5)


def test_two_starts_in_one_second_get_two_folders(call: Call, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsb.config.compose, "datetime", Standing)
    taken = [tmp_path / kind / "2026-01-02" / "03-04-05" for kind in ("outputs", "multirun")]
    for folder in taken:
        folder.mkdir(parents=True)
    once = [*small, "federation.num_rounds=1"]
    assert call("run", *once)[0] == 0
    assert call("run", "-m", *once, "seed=1,2")[0] == 0
    assert call("run", *once, "data.label=nothing")[0] == 2
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("summary.json"))
    assert found == [f"multirun/2026-01-02/03-04-05-1/seed={seed}" for seed in (1, 2)] + ["outputs/2026-01-02/03-04-05-1"]
    assert not [path for folder in taken for path in folder.iterdir()]
    assert len(list(taken[0].parent.iterdir())) == 2


def test_a_sweep_shows_the_configuration_of_each_job(call: Call, tmp_path: Path) -> None:
    status, out, _ = call("run", "-m", "--cfg", "job", "seed=3,4", "rank=2")
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith(("# job", "seed:"))] == [
        "# job 1 of 2: seed=3", "seed: 3", "# job 2 of 2: seed=4", "seed: 4",
    ]  # fmt: skip
    assert call("run", "-m", "--info", "config", "seed=3,4")[0] == 2
    assert not list(tmp_path.iterdir())


def test_what_a_disk_refuses_leaves_no_half_of_an_export_and_no_report_in_pieces(call: Call, small: list[str], tmp_path: Path) -> None:
    assert call("run", *small, "federation.num_rounds=1", "output=run")[0] == 0
    (tmp_path / "there").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with files_no_larger_than(5000):
        for command in (["export", "run", "new/out"], ["export", "run", "there"], ["report", "run"]):
            status, _, err = call(*command)
            assert (status, err.splitlines()) == (1, ["error: file too large"])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "there", "home"}
    for place in ("new/out", "there"):
        assert call("export", "run", place)[0] == 0
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (tmp_path / place).iterdir()}
