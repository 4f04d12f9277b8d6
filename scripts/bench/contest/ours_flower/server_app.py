"""The product's strategy over Flower's grid. Between rounds it waits for the word in a pipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsb.app.prepare import prepare
from fedsb.app.threads import use_threads
from fedsb.config.compose import load, split_overrides
from fedsb.core.state import State
from fedsb.run.records import RoundRecord
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.frozen import FrozenLog

app = ServerApp()


class Piped:
    """Listens to a strategy: lets each round begin when a word comes through the pipe."""

    def __init__(self, said: str, heard: str) -> None:
        self._said, self._heard = Path(said), Path(heard)

    def begin(self, round_number: int, clients: Sequence[str], stage: str) -> None:
        """Wait for the word."""
        if round_number and not stage:
            self._heard.read_text()

    def reply(self, client: str, ok: bool) -> None:
        """Stop at a client that failed."""
        assert ok, f"{client} failed"

    def end(self, record: RoundRecord, state: State, frozen: FrozenLog) -> None:
        """Say so."""
        self._said.write_text("done\n" if record.round else "ready\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the overrides."""
    config = load(split_overrides(str(context.run_config["overrides"])))
    use_threads(config)
    prepared = prepare(config)
    prepared.strategy.listener = Piped(os.environ["BENCH_SAID"], os.environ["BENCH_HEARD"])
    prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=config.federation.num_rounds)
