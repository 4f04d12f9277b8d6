"""What a server needs for methods whose frozen weights grow: seconds and memory over rounds at the shapes of a large language model.

Each method runs in a process of its own, from random uploads to messages: the real rule, frozen log, exactness gap, checkpoint of the log,
and the bundle for clients that were there in the round before, encoded. There is no model: all adapted layers have the shapes of
``conf/model/llama_3_2_3b.yaml``. Memory is anonymous memory beyond that of the process before the first round, looked at every 20 ms; files
of the log that the system keeps in memory while there is room are not counted. Seconds are CPU time, one thread. Uploads come one at a
time from a seed. The log's files are looked at behind each checkpoint, and while one is written as often as memory; beside them stands what
all deltas together would be.

``python scripts/bench/growing.py [method=…] [clients=25] [rounds=10] [rank=32] [model=llama_3_2_3b]`` prints one table row a method.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

import torch

from fedsb.config.compose import load
from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, State, unpack
from fedsb.models.build import build_model
from fedsb.run.checkpoint import Snapshot, save_checkpoint
from fedsb.tasks.task import TASKS
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.messages import encode_shared
from strategies import LowRankStrategy
from strategies.reducers import PlainMean
from strategies.rounds import RoundState

METHODS = ("fedavg_lora", "fed_sb", "fedex_lora", "flora")
DEFAULTS = {"clients": "25", "rounds": "10", "rank": "32", "model": "llama_3_2_3b"}
GB, PAUSE_S = 10**9, 0.02
HEAD = "| method | uploads of a round, GB | beyond the start at most, GB | beyond that and a round's uploads, GB | bundle of a round, GB "
HEAD += "| log's files at most: after a round, while it is saved, all deltas, GB | gap, its standard error "
HEAD += "| CPU seconds a round: uploads made, rule and gap, log, checkpoint, bundle |"


def main(arguments: list[str]) -> None:
    given = {**DEFAULTS, **dict(argument.split("=", 1) for argument in arguments)}
    if "alone" in given:
        print(json.dumps(measured(given["alone"], given)))
        return
    print(HEAD, "|---|---|---|---|---|---|---|---|", sep="\n", flush=True)
    for method in [given["method"]] if "method" in given else METHODS:
        options = [f"{key}={given[key]}" for key in DEFAULTS]
        done = subprocess.run([sys.executable, __file__, f"alone={method}", *options], check=True, capture_output=True, text=True)
        print(row(method, json.loads(done.stdout.splitlines()[-1])), flush=True)


def row(method: str, m: dict[str, float]) -> str:
    seconds = ", ".join(f"{m[key]:.1f}" for key in ("made", "rule", "log", "saved", "bundled"))
    sizes = [f"{m[key] / GB:.2f}" for key in ("uploads", "peak")] + [f"{max(0.0, m['peak'] - m['uploads']) / GB:.2f}"]
    gap = f"{m['gap']:.1e}" + (f" ± {m['error']:.1%}" if m["error"] else "")
    files = ", ".join(f"{m[key] / GB:.2f}" for key in ("files", "files_peak", "deltas"))
    return f"| `{method}` | {' | '.join(sizes)} | {m['bundle'] / GB:.2f} | {files} | {gap} | {seconds} |"


def strategy_of(method: str, given: dict[str, str]) -> tuple[LowRankStrategy, State]:
    """Return the strategy at the shapes of a model, and its first state."""
    from fedsb.app.prepare import shapes_alone

    overrides = [f"model={given['model']}", f"method={method}", f"rank={given['rank']}", f"federation.num_clients={given['clients']}"]
    config = load([*overrides, "data.kind=files", "data.path=none.csv"])
    adapted = build_model(
        config.model, config.adapter, family=config.method.adapter, task=TASKS["causal_lm"], labels=(), seed=0, device="meta"
    )
    strategy = shapes_alone(config, adapted)
    strategy.frozen.append(drawn(adapted.layouts.log, 0, 0))
    return strategy, drawn(adapted.layouts.down, 0, 1)


def drawn(layout: Layout, number: int, client: int) -> State:
    """Draw values, small as those of factors, as they come off the wire."""
    generator = torch_generator(number, "uploads", client)
    return unpack({group: torch.randn(size, generator=generator).mul_(0.02) for group, size in layout.sizes.items()}, layout)


def measured(method: str, given: dict[str, str]) -> dict[str, float]:
    """Run the rounds of one method."""
    torch.set_num_threads(1)
    strategy, state = strategy_of(method, given)
    clients, rounds = strategy.participation.clients, int(given["rounds"])
    seconds = dict.fromkeys(("made", "rule", "log", "saved", "bundled"), 0.0)
    found = {"uploads": 4.0 * len(clients) * strategy.layouts.up_in(1).numel, "bundle": 0.0, "gap": 0.0, "error": 0.0}
    found |= {"files": 0.0, "deltas": 4.0 * strategy.layouts.log.numel}
    folder = Path(tempfile.mkdtemp(prefix="growing-"))
    try:
        with watched(anonymous) as memory, watched(lambda: logged(folder)) as disk:
            for number in range(1, rounds + 1):
                before = strategy.frozen.version
                state = one_round(strategy, state, number, seconds)
                took = time.process_time()
                found["deltas"] += 4.0 * sum(delta.numel for version, delta in strategy.frozen.deltas().items() if version > before)
                save_checkpoint(folder, Snapshot(number, state, strategy.frozen))
                seconds["saved"] += time.process_time() - took
                found["files"] = max(found["files"], logged(folder))
                took = time.process_time()
                bundle = strategy.frozen.bundle(strategy.frozen.version - 1) if number < rounds else None
                shared = encode_shared(encode_arrays(state), bundle)
                found["bundle"] = max(found["bundle"], 4.0 * bundle.state.numel if bundle else 0.0)
                seconds["bundled"] += time.process_time() - took
                del bundle, shared
                under_way = strategy._round
                assert under_way is not None
                found["gap"], found["error"] = max(found["gap"], under_way.gap or 0.0), max(found["error"], under_way.gap_error or 0.0)
                sizes = f"{memory[0] / GB:.2f} GB at most, {logged(folder) / GB:.2f} GB in files, {seconds['saved']:.0f} s for checkpoints"
                print(f"{method} round {number}: {sizes}", file=sys.stderr, flush=True)
        return {**found, "peak": memory[0], "files_peak": disk[0], **{key: value / rounds for key, value in seconds.items()}}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def one_round(strategy: LowRankStrategy, state: State, number: int, seconds: dict[str, float]) -> State:
    """Take a round's uploads as the strategy does, and return the state that is sent next."""
    from strategies.method import Following

    clients, layout = strategy.participation.clients, strategy.layouts.up_in(number)
    strategy._round = RoundState(number, clients)
    strategy._sent = strategy.frozen.view().basis.merge(state)
    strategy._rule = rule = strategy.over_uploads() or Following(PlainMean(), strategy, strategy._sent)
    rule.begin(strategy._current())
    strategy.gap.begin(strategy._sent, strategy.frozen.view(), strategy.spec.uploaded(number))
    for i in range(len(clients)):
        begun = time.process_time()
        upload = drawn(layout, number, 2 + i)
        made = time.process_time()
        rule.add(upload, 1.0 + i % 3)
        strategy.gap.add(upload, 1.0 + i % 3)
        strategy._round.note({}, 1.0 + i % 3)
        seconds["made"] += made - begun
        seconds["rule"] += time.process_time() - made
        del upload
    begun = time.process_time()
    append = strategy.frozen.append

    def timed(delta: State) -> None:
        start = time.process_time()
        append(delta)
        seconds["log"] += time.process_time() - start
        seconds["rule"] -= time.process_time() - start

    strategy.frozen.append = timed  # type: ignore[method-assign]
    try:
        del rule
        result = strategy._finish()
    finally:
        strategy.frozen.append = append  # type: ignore[method-assign]
    seconds["rule"] += time.process_time() - begun
    return result


@contextmanager
def watched(size: Callable[[], float]) -> Iterator[list[float]]:
    """Yield the most of a size beyond that at the beginning of the block; it grows while the block runs."""
    before, most, over = size(), [0.0], threading.Event()

    def look() -> None:
        while not over.wait(PAUSE_S):
            most[0] = max(most[0], size() - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def logged(folder: Path) -> float:
    """Return the bytes of the files of the frozen log in a folder, whatever of them is written already."""
    total = 0.0
    for path in chain(folder.glob("frozen-*"), folder.glob("folded-*")):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def anonymous() -> float:
    """Return the bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main(sys.argv[1:])
