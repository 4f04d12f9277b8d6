"""Training on a GPU: ratios to a PEFT loop, of private steps, of clients side by side, and of a whole round, with memory; and a profile.

Run as ``python scripts/bench/gpu.py [--only steps private stack round profile tests] [--turns 5] [--json PATH]``, on a machine that
``scripts/bench/gpu_setup.sh`` has prepared where the project is not installed; some five minutes. A model of Llama-3.2-1B's shape in
bfloat16 with random weights, r = 16. Contenders take turns; a ratio is the median over the turns. A part that fails is told, and the
others go on. ``--dry`` runs every part but the tests on a CPU with tiny shapes, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
from figures import Figure, show
from steps import Contender, Ours, PeftLoop, Shape, base_of, bytes_of, gpu_peak, take_turns, twin
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("fed_sb", "fedavg_lora")
RANK, STEPS, CLIENTS = 16, 8, 4
TINY = "{model_type: llama, vocab_size: 64, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
TINY += "num_key_value_heads: 2}"
# Operations a second in bfloat16, dense, as the maker states them.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        dry: on a CPU, with tiny shapes.
        turns: that count.
    """

    dry: bool
    turns: int

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.dry else "cuda"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of a step, the smallest first."""
        return (Shape(1, 8), Shape(4, 8)) if self.dry else (Shape(1, 128), Shape(4, 128), Shape(4, 512))

    @property
    def steps(self) -> int:
        """In a turn."""
        return 2 if self.dry else STEPS

    @property
    def model(self) -> list[str]:
        """The overrides that name the model."""
        tiny = ["model=llama_3_2_1b", f"model.config={TINY}", "rank=4"]
        return tiny if self.dry else ["model=llama_3_2_1b", "model.dtype=bfloat16", f"rank={RANK}"]

    @cached_property
    def base(self) -> nn.Module:
        """The base that all contenders have a copy of."""
        return base_of(self.model, self.device)

    def bound(self, value: float, applies: bool = True) -> float | None:
        """Return a bound where it is for a figure; there is none to dry ones."""
        return value if applies and not self.dry else None

    def ours(self, method: str) -> Ours:
        """Return our client for a method."""
        return Ours([*self.model, f"method={method}"], twin(self.base), self.device)

    def peft(self, beside: Ours, *, autocast: bool) -> PeftLoop:
        """Return PEFT on the layers that ours adapts."""
        return PeftLoop(twin(self.base), list(beside.adapted.layers), beside.rank, beside.words, autocast=autocast)


def steps(bench: Bench) -> Iterator[Figure]:
    """Our step over PEFT's, in time and memory; tokens a second and what share of the card's peak they are."""
    ours = {method: bench.ours(method) for method in METHODS}
    # What a user of transformers' trainer has with bf16=True, and without.
    peft = {f"PEFT{how}": bench.peft(ours["fed_sb"], autocast=bool(how)) for how in ("", " autocast")}
    trainers: dict[str, Ours | PeftLoop] = {**ours, **peft}
    for shape in bench.shapes:
        contenders: dict[str, Contender] = {name: partial(each.fit, shape, bench.steps) for name, each in trainers.items()}
        times = take_turns(contenders, bench.turns, bench.device)
        best = min(peft, key=times.of)
        for method in METHODS:
            bound = bench.bound(1.0, (method, shape) == ("fed_sb", bench.shapes[-1]))
            yield Figure(f"step of {shape} tokens, {method} over {best}, time", times.ratio(method, best), bound)
        for name in contenders:
            yield Figure(f"  milliseconds of a step, {name}", 1e3 * times.of(name) / bench.steps)
        if not bench.dry:
            models = {name: each.adapted.model if isinstance(each, Ours) else each.model for name, each in trainers.items()}
            yield from _memory(shape, contenders, models)
            yield from _throughput(bench, shape, times.of("fed_sb") / bench.steps)


def _memory(shape: Shape, contenders: dict[str, Contender], models: dict[str, nn.Module]) -> Iterator[Figure]:
    held = {name: bytes_of(models[name]) + gpu_peak(run) for name, run in contenders.items()}
    least = min(size for name, size in held.items() if name.startswith("PEFT"))
    for method in METHODS:
        bound = 1.0 if method == "fed_sb" and shape.batch * shape.tokens >= 2048 else None
        yield Figure(f"step of {shape} tokens, {method} over PEFT, memory, base included", held[method] / least, bound)
    for name, size in held.items():
        yield Figure(f"  GiB, {name}", size / 2**30)


def _throughput(bench: Bench, shape: Shape, seconds: float) -> Iterator[Figure]:
    """A step multiplies by each frozen weight twice: there is no gradient of weights. Attention itself is left out."""
    multiplied = sum(p.numel() for name, p in bench.base.named_parameters() if p.ndim == 2)  # the tied table multiplies once, as head
    rate = shape.batch * shape.tokens / seconds
    yield Figure("  fed_sb, tokens a second", rate)
    name = torch.cuda.get_device_name()
    for card, peak in PEAKS.items():
        if card in name:
            yield Figure(f"  fed_sb, share of the {card}'s bfloat16 peak", 4 * multiplied * rate / peak)


def private(bench: Bench) -> Iterator[Figure]:
    """A private step over ours."""
    for method in METHODS:
        ours = bench.ours(method)
        for shape in bench.shapes:
            contenders: dict[str, Contender] = {
                "private": partial(ours.private, shape, bench.steps),
                "plain": partial(ours.fit, shape, bench.steps),
            }
            times = take_turns(contenders, bench.turns, bench.device)
            yield Figure(f"private step of {shape} tokens over a plain one, {method}", times.ratio("private", "plain"), bench.bound(1.5))


def stack(bench: Bench) -> Iterator[Figure]:
    """Clients side by side over one after the other."""
    for method in METHODS:
        ours = bench.ours(method)
        for shape in bench.shapes:
            for clients in (4, 8):
                together = partial(ours.stacked, shape, bench.steps, clients)
                alone = partial(_one_after_the_other, ours, shape, bench, clients)
                times = take_turns({"together": together, "alone": alone}, bench.turns, bench.device)
                bound = bench.bound(0.4, (shape, clients) == (bench.shapes[0], 8))
                what = f"{clients} clients side by side over one after the other, {shape} tokens, {method}"
                yield Figure(what, times.ratio("together", "alone"), bound)


def _one_after_the_other(ours: Ours, shape: Shape, bench: Bench, clients: int) -> None:
    for client in range(clients):
        ours.install()
        ours.fit(shape, bench.steps, client)


def whole_round(bench: Bench) -> Iterator[Figure]:
    """A round of four clients, each of which installs, trains and uploads, over the sum of its steps."""
    shape, few, many = bench.shapes[-1], 2 * bench.steps, 6 * bench.steps
    for method in METHODS:
        ours = bench.ours(method)

        def clients(ours: Ours = ours) -> None:
            for client in range(CLIENTS):
                ours.install()
                ours.fit(shape, few, client)
                ours.upload()

        contenders: dict[str, Contender] = {"round": clients, "few": partial(ours.fit, shape, few), "many": partial(ours.fit, shape, many)}
        times = take_turns(contenders, bench.turns, bench.device)
        # What longer training takes more is steps and nothing else.
        step = (times.of("many") - times.of("few")) / (many - few)
        over = times.of("round") / (CLIENTS * few * step)
        yield Figure(f"round of {CLIENTS} clients x {few} steps of {shape} tokens over its steps, {method}", over, bench.bound(1.03))


def profiled(bench: Bench) -> Iterator[Figure]:
    """What takes the time of some steps, how long the card stands idle, and where the host waits."""
    ours, shape = bench.ours("fed_sb"), bench.shapes[-1]
    ours.fit(shape, 2)
    activities = [ProfilerActivity.CPU] if bench.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    begun = time.perf_counter()
    with profile(activities=activities) as recorded:
        ours.fit(shape, bench.steps)
        if not bench.dry:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    events = recorded.key_averages()
    print(events.table(sort_by="self_cpu_time_total" if bench.dry else "self_cuda_time_total", row_limit=15, max_name_column_width=60))
    waits = {event.key: event.count for event in events if event.key.startswith(WAITS)}
    print(f"host waits in {bench.steps} steps, beginning and end of a round included: {waits or 'none'}")
    if not bench.dry:
        busy = sum(event.self_device_time_total for event in events) / 1e6
        yield Figure("share of the profiled time in which the card computes", busy / seconds)
    yield Figure("host waits a step", sum(waits.values()) / bench.steps)


def tests(bench: Bench) -> Iterator[Figure]:
    """The tests that need a GPU."""
    if not bench.dry:
        # Warnings are errors in the versions that are tested, and others may be here.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--timeout=0",
            "-W",
            "ignore",
            "tests/test_gpu.py",
        ]
        done = subprocess.run(command, cwd=ROOT, timeout=400, check=False)
        yield Figure("exit status of pytest -m gpu", done.returncode, 0)


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "steps": steps,
    "private": private,
    "stack": stack,
    "round": whole_round,
    "profile": profiled,
    "tests": tests,
}


def main() -> int:
    """Run the parts, whatever becomes of one."""
    options = parse()
    bench = Bench(options.dry, 1 if options.dry else options.turns)
    if not options.dry and not torch.cuda.is_available():
        print("no GPU here: --dry runs every part on the CPU with tiny shapes, to see that it runs")
        return 2
    card = "a CPU, dry" if options.dry else torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {' '.join(bench.model)}", flush=True)
    found: list[Figure] = []
    failed: list[str] = []
    for part in options.only:
        begun = time.monotonic()
        try:
            for figure in PARTS[part](bench):
                found.append(show(figure))
                if options.json:
                    options.json.write_text(json.dumps([each.as_json() for each in found], indent=2) + "\n")
        except Exception:  # a GPU is rare: whatever breaks, the other parts are measured
            failed.append(part)
            traceback.print_exc()
        print(f"-- {part}: {time.monotonic() - begun:.0f} s", flush=True)
    missed = [figure.what.strip() for figure in found if not figure.holds]
    print(f"failed parts: {', '.join(failed) or 'none'}; bounds missed: {'; '.join(missed) or 'none'}")
    return 1 if failed or missed else 0


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--turns", type=int, default=5, help="that count; one more warms up")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there too, after each")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
