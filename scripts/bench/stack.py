"""Where training side by side pays: CPU of a round with K clients in one pass over that of one after the other, by the size of a step.

Run as ``python scripts/bench/stack.py [--rounds 4] [--private]`` on an installed project with the extra `dev`; some 15 minutes. 8 clients,
4 steps each, FedAvg-LoRA r = 8, one thread; the sizes of a stack take turns, round by round, each in a process of its own. This is what
``runtime.stack=auto`` rests on: see ``MOST_TOKENS`` and ``MOST_CLIENTS`` in ``fedsb/runtime/stack_size.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median

from contest.contest import Contestant, Look, Rounds, look_at, take_turns
from contest.workload import Shape, write_workload

from fedsb.runtime.stack_size import size_that_pays

SHAPES = (Shape(4, 32), Shape(8, 32), Shape(8, 64), Shape(16, 64))
STACKS = (1, 2, 4, 8)


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="that count; one more warms up")
    parser.add_argument("--private", action="store_true", help="with DP-SGD")
    options = parser.parse_args()
    print("| step of a client | tokens | " + " | ".join(f"stack of {k}" for k in STACKS) + " | `auto` | MB, one | MB, " + f"{STACKS[-1]} |")
    print("|---" * (len(STACKS) + 5) + "|", flush=True)
    for shape in SHAPES:
        found, alone = measure(shape, options.rounds, private=options.private)
        ratios = " | ".join(f"{relative(found, k):.2f}" for k in STACKS)
        tokens = shape.batch * shape.tokens
        memory = " | ".join(f"{alone[k].pss_mb:.0f}" for k in (1, STACKS[-1]))
        print(f"| {shape.name} | {tokens} | {ratios} | {size_that_pays(tokens)} | {memory} |", flush=True)
    return 0


def measure(shape: Shape, rounds: int, *, private: bool) -> tuple[Mapping[int, Rounds], Mapping[int, Look]]:
    """Let stacks of every size do their rounds in turns, and look at the memory of the least and the largest."""
    with tempfile.TemporaryDirectory() as folder:
        # One warms up, and nobody comes to the last: one that is over, and ends, would disturb the others.
        work = write_workload(Path(folder) / "work.json", shape, rounds + 2, private=private)
        ours = [sys.executable, "-m", "contest.ours", str(work)]
        starts = {k: partial(Contestant, [*ours, f"runtime.stack={k}"]) for k in STACKS}
        return take_turns(starts, rounds), {k: look_at(starts[k]) for k in (1, STACKS[-1])}


def relative(found: Mapping[int, Rounds], k: int) -> float:
    """Return the median, over the rounds, of the CPU of a stack over that of one client after the other."""
    return median(mine / alone for mine, alone in zip(found[k].cpu_s, found[1].cpu_s, strict=True))


if __name__ == "__main__":
    sys.exit(main())
