"""Small federations that die after so many replies, and one that did."""

from __future__ import annotations

from pathlib import Path
from shlex import join
from typing import Any

import pytest

from fedsb import client_app
from fedsb.client_stack import answer_together
from fedsb.config.compose import load
from fedsb.run.resuming import resumed
from fedsb.runtime.stack_size import stack_size
from fedsb.server_app import serve
from tests.run.mortal import Killed, Mortal, Run
from tests.strategies.federations import in_rounds
from tests.strategies.private_runs import small


@pytest.fixture
def run(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a small federation of three rounds in a folder; it dies after ``life`` replies."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))

    def go(folder: Path, *more: str, life: int = 10**9, after: bool = False) -> dict[str, Any]:
        resuming = any(override.startswith("resume=") for override in more)
        overrides = list(more) if resuming else small(tiny_bert, tmp_path, in_rounds(3), *more)
        config = resumed(load(overrides), overrides)
        stack = {"stack": stack_size(config), "together": answer_together}
        grid = Mortal.simulation(client_app.app, {"overrides": join(overrides), "output": str(folder)}, **stack)
        grid.life, grid.after = life, after
        return serve(config, grid, folder)

    return go


@pytest.fixture
def stopped(run: Run, tmp_path: Path) -> Path:
    """A run of three rounds that was killed in its third."""
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(folder, "init.kind=weight_svd", life=10)
    assert [path.name for path in sorted((folder / "checkpoints").glob("round-*"))] == ["round-0001.safetensors", "round-0002.safetensors"]
    return folder
