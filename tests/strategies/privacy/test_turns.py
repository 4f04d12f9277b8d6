"""What a client checks before it trains privately, it checks of the factors that learn in a turn when that turn first comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clients.self_checks import FirstRound
from fedsb.adapters import SPECS
from fedsb.config.compose import load
from fedsb.core.state import HEAD
from tests.strategies.federations import FEDERATED_METHODS as METHODS
from tests.strategies.private_runs import EXAMPLE, run_privately, small


def test_each_turn_is_checked_when_it_first_comes(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that shows in A's gradients alone is found in round 2, where A learns for the first time."""
    monkeypatch.setenv("FEDSB_HOME", str(tmp_path / "home"))
    checked: list[tuple[int, set[str]]] = []
    plain = FirstRound.depends

    def noting(self: FirstRound, output: Callable[[], Any]) -> None:
        checked.append((len(checked), {name.role for name in self._trained}))
        plain(self, output)

    monkeypatch.setattr(FirstRound, "depends", noting)
    turns = [method for method in METHODS if SPECS[load([f"method={method}"]).method.adapter].turns > 1]
    assert turns
    for method in turns:
        checked.clear()
        run = run_privately(small(tiny_bert, tmp_path, *EXAMPLE, f"method={method}", "federation.num_rounds=4"), tmp_path / method)
        assert run.error is None
        spec = SPECS[run.config.method.adapter]
        assert [roles - {HEAD} for _, roles in checked] == [{*spec.learn(turn)} for turn in range(1, spec.turns + 1) for _ in range(4)]
