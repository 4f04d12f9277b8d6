"""What a sweep costs beside its training: its jobs side by side over the same one by one, and over the time of their rounds alone.

Run as ``python scripts/bench/sweep.py [--jobs 24] [--abreast 2] [KEY=VALUE …]`` on an installed project with the extra `dev`, on a machine
with nothing else to do; some ten minutes on two cores. The jobs are `experiment=quick`'s, of three methods at two ranks over seeds,
without plots. *One by one* is ``fedsb run -m`` without ``sweep.jobs``, in one process, which shares its start too; the rounds alone are
the sum of what the records of the sweep side by side say of each round, over the jobs at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from figures import Figure, show

METHODS, RANKS = ("fedavg_lora", "fedex_lora", "fed_sb"), (4, 8)


def main() -> int:
    """Measure and print the figures; 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=24, help="a multiple of six")
    parser.add_argument("--abreast", type=int, default=2)
    options, overrides = parser.parse_known_args()
    seeds = ",".join(map(str, range(max(1, options.jobs // (len(METHODS) * len(RANKS))))))
    grid = [f"method={','.join(METHODS)}", f"rank={','.join(map(str, RANKS))}", f"seed={seeds}"]
    with tempfile.TemporaryDirectory() as folder:
        found = [show(figure) for figure in measure(Path(folder), grid, options.abreast, overrides)]
    return int(not all(figure.holds for figure in found))


def measure(folder: Path, grid: Sequence[str], abreast: int, overrides: Sequence[str]) -> Iterator[Figure]:
    """Run the sweep both ways and hold their results against each other, too.

    Raises:
        RuntimeError: a sweep failed, or the bits differ.
    """
    together = swept(folder, "abreast", [*grid, *overrides, f"sweep.jobs={abreast}"])
    single = swept(folder, "single", [*grid, *overrides])
    if bits(folder / "abreast") != bits(folder / "single"):
        raise RuntimeError("jobs side by side end with other bits than one by one")
    rounds = sum(row.get("wall_s") or 0.0 for path in (folder / "abreast").glob("*/metrics.jsonl") for row in rows(path))
    yield Figure("jobs", float(len(bits(folder / "abreast"))))
    yield Figure(f"seconds, {abreast} side by side", together)
    yield Figure("seconds, one by one", single)
    yield Figure("seconds of rounds, side by side", rounds)
    yield Figure("side by side over one by one", together / single, 0.6)
    yield Figure("side by side over its rounds alone", together / (rounds / abreast), 1.15)


def swept(folder: Path, name: str, arguments: Sequence[str]) -> float:
    """Return the seconds of a sweep, from the start of its process to its end."""
    command = [sys.executable, "-m", "fedsb.cli", "run", "-m", "experiment=quick", "plots=false", f"output={folder / name}", *arguments]
    begun = time.monotonic()
    done = subprocess.run(command, env={**os.environ, "FEDSB_HOME": str(folder / "home")}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.monotonic() - begun


def rows(path: Path) -> list[dict[str, float]]:
    """Return the records of a run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bits(sweep: Path) -> dict[str, str]:
    """Return the hash of each job's factors, by its folder."""
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8"))["factors_sha256"] for path in sweep.glob("*/summary.json")}


if __name__ == "__main__":
    sys.exit(main())
