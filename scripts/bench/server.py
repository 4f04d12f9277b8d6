"""What a round costs a server, method by method: 25 clients, rank 32, one matrix of 4096 x 4096; CPU seconds and peak memory of the rule.

Run as ``python scripts/bench/server.py [--clients 25] [--rank 32] [--size 4096] [--turns 3]``. Uploads are random, made before; each rule
takes them one by one in a process of its own, in turns, one thread; medians. Memory is that of the process beyond what it held with its
uploads. Beside the methods a dense float32 SVD of the mean product, as published code has it. Exit status 1 if a bound fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from math import prod
from statistics import median
from typing import Any

import torch
from figures import Figure, show

from fedsb.adapters import SPECS, AdapterSpec, Layouts
from fedsb.adapters.sketched import Sketched
from fedsb.config.compose import load
from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, Name, State, WeightedSum
from strategies import STRATEGIES
from strategies.base import LowRankStrategy
from strategies.method import Following
from strategies.participation import Participation
from strategies.reducers import PlainMean
from strategies.rounds import RoundState

DENSE = "a dense SVD"
OF_THE_SVD = ("flexlora", "florist", "fedmomentum")
Take = Callable[[list[State]], object]


def main() -> int:
    """Print a line a method and hold the SVD family against the dense SVD."""
    options = parse()
    torch.set_num_threads(1)
    names = [DENSE, *(name for name in STRATEGIES if uploads_of(name, 2, 2))]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.turns):
        for name in names if turn == 0 else names[1:]:  # the dense one takes as long as all others together, and is far from any bound
            taken[name].append(apart(name, options.size, options.rank, options.clients))
            print(f"turn {turn + 1}: {name} {taken[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    print("| | CPU s | spread | MB beyond the uploads |\n| --- | --- | --- | --- |")
    for name, found in taken.items():
        seconds = [cpu for cpu, _ in found]
        print(f"| {name} | {median(seconds):.2f} | {min(seconds):.2f}-{max(seconds):.2f} | {median(mb for _, mb in found):,.0f} |")
    dense = taken[DENSE][0][0]
    ratios = [Figure(f"a dense SVD over {name}", dense / median(s for s, _ in taken[name]), 10.0, at_least=True) for name in OF_THE_SVD]
    shown = [show(figure) for figure in ratios]
    return 0 if all(figure.holds for figure in shown) else 1


def apart(name: str, size: int, rank: int, clients: int) -> tuple[float, float]:
    """Return CPU seconds and MB of a round, measured in a child of this process."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(write, json.dumps(measured(name, size, rank, clients)).encode())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(write)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{name}: the rule ended with an error")
    with os.fdopen(read) as answer:
        cpu, mb = json.loads(answer.read())
    return cpu, mb


def measured(name: str, size: int, rank: int, clients: int) -> tuple[float, float]:
    """Return CPU seconds and MB of a round, in this process."""
    shapes = uploads_of("fedavg_lora" if name == DENSE else name, size, rank)
    uploads = [drawn(shapes, client) for client in range(clients)]
    take = dense if name == DENSE else rule_of(name, size, rank, clients)
    held, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = take(uploads)
    cpu = time.process_time() - begun
    del result
    return cpu, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1e3


def spec_of(name: str) -> AdapterSpec:
    """Return the family of a method."""
    config = load([f"method={name}"])
    return SPECS[config.method.adapter].having(config.adapter.options)


def uploads_of(name: str, size: int, rank: int) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes that a client uploads after a first round; nothing where there are no factors, or where a client keeps some."""
    spec = spec_of(name)
    shapes = spec.shapes(size, size, rank) if spec.roles and spec.has_global_model else {}
    if shapes and spec.sketch:
        return {role: shape for role, shape in spec.sketch.shapes(size, size, rank).items() if role != "Q"}
    return {role: shapes[role] for role in spec.uploaded(1)} if shapes and load([f"method={name}"]).method.setting == "federated" else {}


def drawn(shapes: Mapping[str, tuple[int, ...]], client: int) -> State:
    """Return random factors of the norm of an orthonormal one, as they come off the wire: in one block."""
    flat = torch.randn(sum(map(prod, shapes.values())), generator=torch_generator(0, "server", client)).mul_(0.02)
    parts = torch.split(flat, [prod(shape) for shape in shapes.values()])
    return State({Name("layer", role): part.view(shape) for (role, shape), part in zip(shapes.items(), parts, strict=True)})


def rule_of(name: str, size: int, rank: int, clients: int) -> Take:
    """Return what a method makes of the uploads of a round."""
    spec, options = spec_of(name), load([f"method={name}"]).method.options
    shapes = {Name("layer", role): shape for role, shape in spec.shapes(size, size, rank).items()}
    layout = Layout(tuple(sorted(shapes.items())))
    held = drawn(spec.shapes(size, size, rank), clients)
    names = tuple(f"client-{number}" for number in range(clients))
    layouts = Layouts(layout, (layout,) * spec.turns, layout)
    strategy: LowRankStrategy = STRATEGIES[name](spec=spec, layouts=layouts, scale=1.0, participation=Participation(names), **options)
    strategy._round, strategy._sent = RoundState(2, names), held  # round 2: the first of which some methods make more than a mean
    rule = strategy.over_uploads() or Following(PlainMean(), strategy, held)
    if spec.sketch:
        return projecting(spec.sketch, rule, held)

    def take(uploads: list[State]) -> object:
        rule.begin(held)
        for number, upload in enumerate(uploads):
            rule.add(upload, 1.0 + number % 3)
        return rule.finish()

    return take


def projecting(sketch: Sketched, rule: Any, held: State) -> Take:
    """Return what is made of both uploads of a round: a basis of the first ones' mean, and the mean of what the second ones are in it."""

    def take(uploads: list[State]) -> object:
        ranges, probes = WeightedSum(), WeightedSum()
        for number, upload in enumerate(uploads):
            ranges.add(upload.pick("Y"), 1.0 + number % 3)
        bases = sketch.bases(ranges.mean())
        rule.begin(held)
        rule.onto(sketch.sides(bases), held)
        for number, upload in enumerate(uploads):
            seen = {Name(name.module, "A"): t.T.contiguous() for name, t in upload.pick("Z").items()}
            rule.add(State(seen), 1.0 + number % 3)
            probes.add(upload.pick("P"), 1.0 + number % 3)
        return rule.finish(), sketch.outside(bases, probes.mean())

    return take


def dense(uploads: list[State]) -> object:
    """Return the leading singular vectors of the mean product, formed whole."""
    b, a = (Name("layer", role) for role in "BA")
    mean = torch.zeros(len(uploads[0][b]), uploads[0][a].shape[1])
    for upload in uploads:
        mean.addmm_(upload[b], upload[a], alpha=1 / len(uploads))
    u, s, vh = torch.linalg.svd(mean, full_matrices=False)
    rank = uploads[0][b].shape[1]
    return u[:, :rank] * s[:rank], vh[:rank]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in (("clients", 25), ("rank", 32), ("size", 4096), ("turns", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
