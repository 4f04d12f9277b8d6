"""The ServerApp of a staged fedsb that asks all nodes, round after round, what ``describe`` answers; it is put into the app's folder.

Beside it lies the echo's module, whose way of waiting it shares: SuperNodes ask for messages all the while, and that is CPU time too.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from .echo import awaited, looked_for

app = ServerApp()
OUT, ROUNDS, NODES = "idle_out=", "idle_rounds=", "idle_nodes="


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask; what is this app's own in the overrides the nodes never see."""
    words = shlex.split(str(context.run_config["overrides"]))
    out, rounds, count = (next(word.removeprefix(key) for word in words if word.startswith(key)) for key in (OUT, ROUNDS, NODES))
    told = shlex.join(word for word in words if not word.startswith("idle_"))
    nodes = awaited(grid, int(count))
    for number in range(int(rounds) + 1):
        begun = time.monotonic()
        asked = ConfigRecord({"clients": "[]", "labels": json.dumps([]), "overrides": told})
        replies = looked_for(grid, [Message(RecordDict({"config": asked}), node, "query.describe") for node in nodes])
        if len(replies) != len(nodes) or any(r.has_error() or "num-examples" not in r.content["metrics"] for r in replies):
            raise RuntimeError(f"round {number}: {[r.error if r.has_error() else dict(r.content['metrics']) for r in replies]}")
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": number, "wall_s": time.monotonic() - begun}) + "\n")
