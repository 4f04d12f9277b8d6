"""The usual ServerApp: Flower's FedAvg. Between rounds it waits for the word in a pipe."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from vanilla_flower.task import load_model, load_work, trained

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the workload's rounds."""
    work = load_work(context)
    said, heard = (Path(os.environ[name]) for name in ("BENCH_SAID", "BENCH_HEARD"))
    clients = len(work["clients"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)

    def commanded(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        said.write_text("done\n" if server_round else "ready\n")
        if server_round < len(work["rounds"]):
            heard.read_text()
        return MetricRecord({})

    strategy.start(grid, ArrayRecord(trained(load_model(work))), num_rounds=len(work["rounds"]), timeout=600, evaluate_fn=commanded)
