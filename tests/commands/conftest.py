"""A place of its own for each command, the command in this process, and a federation that is soon over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsb.cli import main
from tests.commands.calls import Call, handlers_given_back


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand in an empty folder, and give back the loggers and filters that a command takes over."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    with handlers_given_back():
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command in this process; return its exit status and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()  # what the test itself printed, such as the bars of weights that it saved
        with pytest.raises(SystemExit) as done:
            main(arguments)
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture
def quick(tiny_bert: Path, tiny_csv: Path) -> list[str]:
    """A federation of two rounds on a tiny model."""
    return [
        "model=pretrained", f"model.name='{tiny_bert}'", "data=files", f"data.path='{tiny_csv}'", "device=cpu", "rank=2",
        "federation.num_clients=3", "federation.num_rounds=2", "federation.partition.kind=iid", "train.local_steps=1",
        "train.max_length=16", "plots=false",
    ]  # fmt: skip
