"""The figures of language models on a CPU, each beside its bound. Needs the extra `llm`, SmolLM2 with it.

Run as ``python scripts/bench/llm.py [--quick] [--only step] [--json PATH]`` on an installed project. One thread, CPU time of the process,
opponents in turn, medians; exit status 1 if a bound fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from figures import MIB, Figure, peak_bytes, show
from steps import TASK, Contender, Ours, PeftLoop, Shape, take_turns, twin
from torch import nn

from fedsb.config.compose import load
from fedsb.models.loading import load_network

SMOLLM2 = "model=smollm2"
SHAPE = Shape(4, 128)
# What is compared, at which rank, and bounds of CPU time and of memory.
DUELS: dict[str, tuple[int, float | None, float | None]] = {"fed_sb": (32, 1.03, 1.0), "fedavg_lora": (8, 1.03, None)}


def step(quick: bool) -> Iterator[Figure]:
    """A training step of SmolLM2 over that of a PEFT loop of the same rank, with the same tokens learnt."""
    base = load_network(load([SMOLLM2]).model, TASK, (), 0, "cpu")
    for method, (rank, time, memory) in DUELS.items():
        yield from _duel(base, method, rank, time, memory, turns=3 if quick else 9)


def _duel(base: nn.Module, method: str, rank: int, time: float | None, memory: float | None, *, turns: int) -> Iterator[Figure]:
    ours = Ours([SMOLLM2, f"method={method}", f"rank={rank}"], twin(base), "cpu")
    peft = PeftLoop(twin(base), list(ours.adapted.layers), rank, ours.words)
    contenders: dict[str, Contender] = {name: partial(each.fit, SHAPE, 1) for name, each in (("ours", ours), ("PEFT", peft))}
    times = take_turns(contenders, turns, "cpu")
    yield Figure(f"SmolLM2, step of {SHAPE} tokens, {method} r={rank} over PEFT r={rank}, CPU", times.ratio("ours", "PEFT"), time)
    peaks = {name: peak_bytes(run) for name, run in contenders.items()}
    yield Figure("  the same, peak memory beyond the model", peaks["ours"] / peaks["PEFT"], memory)
    for name in contenders:
        yield Figure(f"  CPU seconds of a step, {name}", times.of(name))
        yield Figure(f"  MiB beyond the model, {name}", peaks[name] / MIB)


GROUPS: dict[str, Callable[[bool], Iterator[Figure]]] = {"step": step}


def main() -> int:
    """Measure, print and keep the figures."""
    options = parse()
    torch.set_num_threads(1)
    results: list[Figure] = []
    for group in options.only:
        results += map(show, GROUPS[group](options.quick))
        if options.json:
            options.json.write_text(json.dumps([figure.as_json() for figure in results], indent=2) + "\n")
    failed = [figure.what.strip() for figure in results if not figure.holds]
    print(f"{len(failed)} of {sum(f.bound is not None for f in results)} bounds failed" + "".join(f"\n- {what}" for what in failed))
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too, after each group")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
