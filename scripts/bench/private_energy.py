"""How much of the gradient a private start still finds: energy by the epsilon spent on it. Needs the `demo` extra.

Run as ``python scripts/bench/private_energy.py [overrides …] [--epsilons 0.5 1 3 8]`` on an installed project. MiniLM, all linear layers,
rank 16 + 8, BBC News, 5 clients IID x 320, everyone's every example in each of two exchanges, delta = 1e-4; the start alone costs the
epsilon named. Energy is ``‖Bᵀ G Aᵀ‖²`` of the true mean gradient G over that of its best rank-16 approximation, over all modules. Beside
it the start without noise, and the data-free one; and every example's sketch once clipped to the norm C, once scaled to it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from clients import dense_gradients
from fedsb.app.assembly import task_of
from fedsb.app.client_data import client_features
from fedsb.app.prepare import Prepared, planned, prepare
from fedsb.app.private_run import save_plans
from fedsb.client_app import app
from fedsb.config.compose import load
from fedsb.config.derived import client_names
from fedsb.config.schema import Config
from fedsb.core.state import Name, State, WeightedSum
from fedsb.models.collating import collate
from fedsb.runtime.local import LocalGrid
from fedsb.wire.arrays import encode_arrays

RANK, HALF = 16, 0.5  # of the budget for the start: twice the epsilon asked for is given, and the rest never spent
BASE = (
    "method=fed_sb", f"rank={RANK}", "federation.num_clients=5", "federation.partition.kind=iid", "federation.num_rounds=1", "device=cpu",
    "federation.exactness=false",
)  # fmt: skip
SKETCHES = {"clipped to C": "privacy.init_normalise=false", "scaled to C": "privacy.init_normalise=true"}
START = ("init.kind=gradient", "init.num_examples=1000", "init.power_iterations=0")


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 1.0, 3.0, 8.0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, for another shape or lever")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    plain = [override for override in options.overrides if not override.startswith("privacy")]
    gradients = true_gradients([*BASE, *plain])
    print("| start | " + " | ".join(SKETCHES) + " |\n" + "|---" * (1 + len(SKETCHES)) + "|", flush=True)
    for epsilon in options.epsilons:
        privacy = ("privacy=example", f"privacy.epsilon={epsilon / HALF}", f"privacy.init_fraction={HALF}", "privacy.delta=1e-4")
        found = [share(gradients, [*BASE, *START, *privacy, lever, *options.overrides]) for lever in SKETCHES.values()]
        print(f"| epsilon {epsilon:g} | " + " | ".join(f"{value:.4f}" for value in found) + " |", flush=True)
    print(f"\nwithout noise: {share(gradients, [*BASE, *START, *plain]):.4f}")
    print(f"`weight_svd`, no data: {share(gradients, [*BASE, 'init.kind=weight_svd', *plain]):.4f}")
    return 0


def true_gradients(overrides: Sequence[str]) -> State:
    """Return the mean gradient (m, n) of every module over all training examples, role ``G``."""
    config = load(list(overrides))
    prepared = prepare(config)
    adapted, task = prepared.adapted, task_of(config)
    adapted.reset()
    total = WeightedSum()
    for client in client_names(config):
        features = client_features(config, client, None, prepared.labels)[0]
        chunks = [features[i : i + config.init.micro_batch] for i in range(0, len(features), config.init.micro_batch)]
        batches = [(batch, task.terms(batch)) for batch in (collate(chunk, adapted, task) for chunk in chunks)]
        total.add(dense_gradients(adapted.model, batches, lambda model, batch: task.loss(task.forward(model, batch), batch)), len(features))
    return total.mean()


def share(gradients: State, overrides: Sequence[str]) -> float:
    """Return the share of the best rank's energy that a start holds."""
    basis = started(load(list(overrides)), shlex.join(overrides)).strategy.frozen.view().basis
    held = best = 0.0
    for name, gradient in gradients.items():
        b, a = (basis[Name(name.module, role)].double() for role in ("B", "A"))
        held += float((b.T @ gradient.double() @ a.T).square().sum())
        best += float(torch.linalg.svdvals(gradient.double())[:RANK].square().sum())
    return held / best


def started(config: Config, overrides: str) -> Prepared:
    """Run the start of a federation and no round."""
    with tempfile.TemporaryDirectory() as folder:
        grid = LocalGrid.simulation(app, {"overrides": overrides, "output": folder})
        prepared = planned(prepare(config), grid)
        save_plans(Path(folder) / "ledgers", prepared.plans)
        prepared.strategy.start(grid, encode_arrays(prepared.initial), num_rounds=0, timeout=1e6)
        return prepared


if __name__ == "__main__":
    sys.exit(main())
