"""The figures that the project promises, each beside its bound: training, products, wire, FedEx reducer, sketch. Needs the `demo` extra.

Run as ``python scripts/bench/core.py [--quick] [--only training products wire reducer sketch] [--json PATH]`` on an installed project. One
thread, CPU time of the process, opponents in turn, medians. These take about 20 minutes, ``--quick`` about 5 with looser figures; exit
status 1 if one fails. ``--only accuracy`` (an hour, three seeds; ``--quick``: one) and ``--only demo`` (wall time of what ``make demo``
runs) are left out unless they are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import accuracy
import products
import reducer
import sketch
import torch
import training
import wire
from figures import Figure, show
from transformers.utils import logging as hf_logging

GROUPS: dict[str, Callable[[bool], Iterable[Figure]]] = {
    "wire": wire.figures,
    "reducer": reducer.figures,
    "training": training.figures,
    "products": products.figures,
    "sketch": sketch.figures,
}
WHOLE_RUNS: dict[str, Callable[[bool], Iterable[Figure]]] = {
    "accuracy": accuracy.by_start,
    "demo": lambda quick: [Figure("wall seconds of the demo", demo_seconds(), 300.0)],
}


def main() -> int:
    """Measure, print and keep the figures."""
    options = parse()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    results: list[Figure] = []
    for group in options.only:
        results += map(show, (GROUPS | WHOLE_RUNS)[group](options.quick))
        if options.json:
            options.json.write_text(json.dumps([figure.as_json() for figure in results], indent=2) + "\n")
    failed = [figure.what.strip() for figure in results if not figure.holds]
    print(f"{len(failed)} of {sum(f.bound is not None for f in results)} bounds failed" + "".join(f"\n- {what}" for what in failed))
    return 1 if failed else 0


def demo_seconds() -> float:
    """Return how long the default federation through Flower takes, without the output that it prints."""
    begun = time.monotonic()
    subprocess.run([sys.executable, str(Path(__file__).with_name("demo.py"))], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, steps and clients")
    every = [*GROUPS, *WHOLE_RUNS]
    parser.add_argument("--only", nargs="+", choices=every, default=list(GROUPS), metavar="GROUP", help=", ".join(every))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too, after each group")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
