"""FedEx's reducer against a running dense sum ``Σ w_i B_i A_i − B̄ Ā`` in float32: CPU time, peak memory, accuracy.

Both take the same uploads as they come off the wire, each one flat array with A and B in it. CPU time is that of a reduction of
uploads made before. For memory they come one at a time, each made from a seed when its turn comes and gone when its taker lets go
of it; it is the peak of torch's allocations plus the peak of NumPy's and Python's, uploads, sums and results included, and so never
less than what is held at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from figures import MIB, Figure, numpy_peak_bytes, peak_bytes
from torch import Tensor

from fedsb.core.rng import torch_generator
from fedsb.core.state import Layout, Name, State, unpack
from strategies.methods.fedex_lora import FedExReducer

CLIENTS, RANK, SIZE, SCALE = 25, 32, 4096, 2.0
A, B, U, V = (Name("layer", role) for role in "ABUV")
LAYOUT = Layout(((A, (RANK, SIZE)), (B, (SIZE, RANK))))
Result = tuple[Tensor, Tensor, Tensor]
Reduction = Callable[[Iterator[tuple[State, float]]], object]


def uploads() -> Iterator[tuple[State, float]]:
    """Yield every client's upload with its weight."""
    for client in range(CLIENTS):
        yield unpack({"trained": torch.randn(LAYOUT.numel, generator=torch_generator(0, "uploads", client))}, LAYOUT), 1.0 + client % 3


def factored(source: Iterator[tuple[State, float]]) -> tuple[State, State]:
    """Reduce as the strategy does."""
    reducer = FedExReducer(SCALE, lambda state: state.map(Tensor.float), cohort=CLIENTS)
    reducer.begin(State())
    for upload, weight in source:
        reducer.add(upload, weight)
        del upload
    aggregate = reducer.finish()
    return aggregate.state, aggregate.log


def dense(source: Iterator[tuple[State, float]], dtype: torch.dtype = torch.float32) -> Result:
    """Return Ā, B̄ and the dense residual from running sums."""
    a, b = torch.zeros(RANK, SIZE, dtype=dtype), torch.zeros(SIZE, RANK, dtype=dtype)
    total = sum(1.0 + client % 3 for client in range(CLIENTS))
    residual = torch.zeros(SIZE, SIZE, dtype=dtype)
    for upload, weight in source:
        share = weight / total
        residual.addmm_(upload[B].to(dtype), upload[A].to(dtype), alpha=SCALE * share)
        a.add_(upload[A], alpha=share)
        b.add_(upload[B], alpha=share)
        del upload
    residual.addmm_(b, a, alpha=-SCALE)
    return a, b, residual


def seconds(reduce: Reduction, made: list[tuple[State, float]]) -> float:
    """Return the CPU time of a reduction of uploads made before."""
    begun = time.process_time()
    result = reduce(iter(made))
    elapsed = time.process_time() - begun
    del result
    return elapsed


def peak(reduce: Reduction) -> int:
    """Return the bytes that a reduction holds at most."""
    return peak_bytes(lambda: reduce(uploads())) + numpy_peak_bytes(lambda: reduce(uploads()))


def relative_error() -> float:
    """Return the distance of the factored residual from the dense one in float64, relative to its norm."""
    _, residual = factored(uploads())
    exact = dense(uploads(), torch.float64)[2]
    return float((residual[U].double() @ residual[V].double()).sub_(exact).norm() / exact.norm())


def figures(quick: bool) -> list[Figure]:
    """Measure; the two take turns."""
    made = list(uploads())
    times = [(seconds(factored, made), seconds(dense, made)) for _ in range(7 if quick else 31)]
    del made
    ours, theirs = peak(factored), peak(dense)
    return [
        Figure("FedEx reducer, 25 clients, r=32, 4096 x 4096: CPU, dense sum over ours", median(b / a for a, b in times), 20.0, True),
        Figure("  CPU seconds, ours", median(a for a, _ in times)),
        Figure("  CPU seconds, dense running sum", median(b for _, b in times)),
        Figure("  peak memory, ours over dense sum", ours / theirs, 0.6),
        Figure("  peak MiB, ours", ours / MIB),
        Figure("  peak MiB, dense running sum", theirs / MIB),
        Figure("  relative error against float64", relative_error(), 1e-6),
    ]
