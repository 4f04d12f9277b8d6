"""Kill a run with SIGKILL again and again, resume it each time, and hold its end against that of a run left alone. Needs the `demo` extra.

Run as ``python scripts/storm.py [--kills 20] [--seed 0] [--runtime local|ray] [OVERRIDE …]`` on an installed project; some 15 seconds a
kill. Overrides such as ``runtime.stack=3`` or ``privacy=example privacy.noise_multiplier=2`` stand behind the storm's own. Moments are
drawn from the whole life of a process, its start included, such that the run does not end before its kills are spent. Exit status 1 if one
bit differs, or too few kills fell.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

RUN = [sys.executable, "-m", "fedsb.cli", "run"]
SMALL = (
    "federation.num_clients=4", "federation.num_rounds=120", "train.local_steps=1", "train.batch_size=4", "train.max_length=8",
    "data.max_examples=60", "federation.partition.kind=iid", "init.kind=weight_svd", "federation.server_optimizer.name=momentum",
    "progress=lines",
)  # fmt: skip


def main() -> int:
    """Run once undisturbed and once in the storm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runtime", default="local", choices=["local", "ray"])
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "FEDSB_HOME": home, "HF_HUB_OFFLINE": "1"}
        calm, storm = Path(home) / "calm", Path(home) / "storm"
        start, rounds = undisturbed([*RUN, *given(calm, options)], environment)
        print(f"left alone: {start:.0f} s to its first round, {rounds:.0f} s to its end  {sha256(calm)}", flush=True)
        kills = weather(storm, options, environment, start, rounds)
        same = sha256(storm) == sha256(calm) and kills == options.kills
        print(f"after {kills} kills: {sha256(storm)}  {'PASS' if same else 'FAIL'}")
        return 0 if same else 1


def undisturbed(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run to the end; return the seconds until the first round's line, and from there to the last one's."""
    begun, lines = time.monotonic(), []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines += [time.monotonic()] * line.startswith("round ")
    assert process.returncode == 0
    return lines[0] - begun, lines[-1] - lines[0]


def weather(folder: Path, options: argparse.Namespace, environment: dict[str, str], start: float, rounds: float) -> int:
    """Kill and resume as often as asked for, then let the run end. Return the number of kills that fell."""
    draw, fell = random.Random(options.seed), 0
    for _ in range(options.kills):
        with subprocess.Popen(
            [*RUN, *given(folder, options)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                process.wait(draw.uniform(0.2 * start, start + 1.5 * rounds / options.kills))
            except subprocess.TimeoutExpired:
                end(process.pid)
        if process.returncode != -signal.SIGKILL:
            break  # it ended by itself
        fell += 1
        done = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        print(f"kill {fell}: {done} rounds on the disk", flush=True)
    if not sha256(folder):
        subprocess.run([*RUN, *given(folder, options)], env=environment, check=True, stdout=subprocess.DEVNULL)
    return fell


def given(folder: Path, options: argparse.Namespace) -> Sequence[str]:
    """Return the overrides of the next attempt: the run's own until it has a folder."""
    if not (folder / "config.yaml").exists():
        return [*SMALL, f"output={folder}", f"runtime={options.runtime}", *options.overrides]
    return [f"resume={folder}"]


def end(pid: int) -> None:
    """Kill a process and everything below it at once."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    for one in found:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)


def sha256(folder: Path) -> str:
    """Return the hash of a finished run's factors; empty where it has not finished."""
    path = folder / "summary.json"
    return str(json.loads(path.read_text())["factors_sha256"]) if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
