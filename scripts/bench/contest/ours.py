"""Ours, at the same workload: the strategy over the grid that the overrides name. Says ``ready``, and ``done`` after each round."""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsb.runtime.early import begin


class Commanded:
    """Listens to a strategy: lets each round begin when a line comes in."""

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Wait for the word."""
        if round_number and not stage and not sys.stdin.readline():
            os._exit(0)

    def reply(self, client: str, ok: bool) -> None:
        """Stop at a client that failed."""
        assert ok, f"{client} failed"

    def end(self, record: Any, state: Any, frozen: Any) -> None:
        """Say so."""
        print("done" if record.round else "ready", flush=True)


def main() -> None:
    """Run the federation of the overrides that the workload and the command line name."""
    overrides = [*json.loads(Path(sys.argv[1]).read_text())["overrides"], *sys.argv[2:]]
    begin(overrides)  # as the command line does, and then it imports the rest
    from fedsb.app.prepare import planned, prepare
    from fedsb.app.private_run import save_plans
    from fedsb.app.threads import use_threads
    from fedsb.config.compose import load
    from fedsb.runtime.grids import grid_for
    from fedsb.wire.arrays import encode_arrays

    config = load(overrides)
    use_threads(config)
    with tempfile.TemporaryDirectory() as folder:
        grid = grid_for(config, {"overrides": shlex.join(overrides), "output": folder})
        prepared = planned(prepare(config), grid)
        save_plans(Path(folder) / "ledgers", prepared.plans)
        prepared.strategy.listener = Commanded()
        prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=config.federation.num_rounds)


if __name__ == "__main__":
    main()
