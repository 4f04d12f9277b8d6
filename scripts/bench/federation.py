"""What a real federation costs: three SuperNodes over TLS on one machine, with workers and without, beside Flower's own echo.

Run as ``python scripts/bench/federation.py [--repeats 3] [--rounds 5] [--idle 4] [--json FILE] [-- Hydra overrides …]`` on an installed
project with its demo data, on a quiet machine. CPU seconds are those of a SuperNode, of the processes that it starts for messages, and of
its worker; what a client computes is told by the same run in one process. Kinds of runs take turns, and those without workers have an echo
of their own beside them. Each figure is made of medians; beside it stand the least and the most that any choice of single rounds makes.
The echo's server looks for replies as fedsb's does: Flower's own ``send_and_receive`` sleeps three seconds between two looks, which is
most of such a round on the wall, and is measured for itself. Seconds on the wall hold where nothing else runs; the load is printed. The
overrides make another federation, as ``-- model=smollm2 data.task=causal_lm data.label=null train.max_length=64 train.batch_size=4``; the
bound of a whole round over compute and echo is one of language models, whose compute is most of it. Exit status 1 if a bound is
missed or a kind of run could not be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from federated.field import CLIENTS, Field, Nodes, field, nodes
from federated.found import Found
from federated.runs import Apps, Round, computed, echoed, factors, idled, made, payload, trained
from figures import show

from fedsb.core.folders import home

LEAST_ROUNDS = 3  # of which the one between is counted
QUIET = 0.3  # load of a machine on which nothing else runs
BASE = ("data=bbc_news", f"federation.num_clients={len(CLIENTS)}", "method=fed_sb", "init.kind=weight_svd", "plots=false", "device=cpu")
TINY = ("train.local_steps=5", "train.batch_size=16", "eval.every=1000000", "eval.max_examples=16", "federation.exactness=false")
PRIVATE = ("privacy=example", "privacy.noise_multiplier=1", "federation.num_rounds=1")


class Bench(NamedTuple):
    """Where runs run, what they are, and what was asked for."""

    found: Found
    ground: Field
    apps: Apps
    overrides: Sequence[str]
    options: argparse.Namespace

    def trained(self, online: Nodes, name: str) -> tuple[list[Round], Path]:
        """Run the federation; return rounds and folder."""
        with self.found.loading(name, online):
            return trained(self.ground, online, self.apps, self.overrides, self.options.rounds, name)

    def echoed(self, online: Nodes, values: int, rounds: int, name: str, wait: str = "looking") -> list[Round]:
        """Run the echo."""
        return echoed(self.ground, online, self.apps, values, rounds, name, wait)


def main() -> int:
    """Measure, print, and return 1 where a bound is missed or something could not be measured."""
    options = parse()
    found = Found(language="data.task=causal_lm" in options.overrides)
    loads = [os.getloadavg()[0]]
    if loads[0] > QUIET:
        print(f"load {loads[0]:.1f}: something else runs, and seconds on the wall are not those of a quiet machine", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedsb-bench-") as scratch:
        folder = Path(scratch)
        apps = made(folder / "apps")
        with field(folder, home()) as ground:
            bench = Bench(found, ground, apps, [*BASE, *TINY, *options.overrides], options)
            with nodes(ground, workers=True) as online:
                with_workers(bench, online)
            # Without them a node's memory and CPU are many times as much: where that is too much for the machine the rest is told.
            with noting(found, "without workers"), nodes(ground, workers=False) as online:
                without_workers(bench, online)
    loads.append(os.getloadavg()[0])
    figures = [show(figure) for figure in found.figures()]
    if options.json:
        measured = {"rounds": found.rounds, "model_loads": found.loads, "missing": found.missing}
        said = {"command": sys.argv[1:], "loads": loads, **place(), "figures": [f.as_json() for f in figures], **measured}
        options.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return 0 if all(figure.holds for figure in figures) and not found.missing else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, in turns")
    parser.add_argument("--rounds", type=int, default=5, help=f"of each, {LEAST_ROUNDS} at least; the first and the last are not counted")
    parser.add_argument("--idle", type=int, default=4, help="idle messages a node, of each kind and repeat")
    parser.add_argument("--json", type=Path, help="for the figures")
    parser.add_argument("overrides", nargs="*", help="of the federation")
    options = parser.parse_args()
    if options.rounds < LEAST_ROUNDS or min(options.repeats, options.idle) < 1:
        parser.error(f"--rounds is {LEAST_ROUNDS} at least, --repeats and --idle are 1")
    return options


@contextmanager
def noting(found: Found, what: str) -> Iterator[None]:
    """Print and note why something could not be measured, and go on."""
    try:
        yield
    except RuntimeError as error:
        found.missing.append(f"{what}: {error}")
        print(f"error: {what}: {error}", file=sys.stderr, flush=True)


def place() -> dict[str, Any]:
    """Return when and on what this was measured."""
    versions = {name: version(name) for name in ("fedsb", "flwr", "torch")}
    return {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M}", "machine": platform.machine(), "cores": os.cpu_count(), "versions": versions}


def with_workers(bench: Bench, online: Nodes) -> None:
    """Measure what has workers, and what a client computes, the echoes between."""
    found, ground, options = bench.found, bench.ground, bench.options
    for turn in range(options.repeats):
        rounds, output = bench.trained(online, f"own-{turn}")
        found.add("with workers", rounds)
        found.hashes.append(factors(output))
        found.add("echo", bench.echoed(online, payload(output), options.rounds - 2, f"echo-{turn}"))
        found.add("echo by send_and_receive", bench.echoed(online, payload(output), options.rounds - 2, f"sleeping-{turn}", "sleeping"))
        found.add("empty echo", bench.echoed(online, 0, options.idle, f"empty-{turn}"))
        found.add("idle message", idled(ground, online, bench.apps, bench.overrides, options.idle, f"idle-{turn}"))
        local = ground.folder / f"local-{turn}"
        found.add("compute", computed(local, [*bench.overrides, f"federation.num_rounds={options.rounds}"]))
        found.hashes.append(factors(local))
    for turn in range(2):
        with found.loading(f"private-{turn}", online):
            _, output = trained(ground, online, bench.apps, [*bench.overrides, *PRIVATE], 1, f"private-{turn}")
        found.private.append(factors(output))


def without_workers(bench: Bench, online: Nodes) -> None:
    """Measure the same rounds without workers, and an echo after each run of them."""
    for turn in range(bench.options.repeats):
        rounds, output = trained(bench.ground, online, bench.apps, bench.overrides, bench.options.rounds, f"bare-{turn}")
        bench.found.add("without workers", rounds)
        bench.found.hashes.append(factors(output))
        again = bench.echoed(online, payload(output), bench.options.rounds - 2, f"bare-echo-{turn}")
        bench.found.add("echo without workers", again)


if __name__ == "__main__":
    sys.exit(main())
