"""What the laws of the frozen log share: logs of drawn versions, and a slow loop over all deltas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.wire.arrays import encode_arrays
from fedsb.wire.frozen import FrozenBundle, FrozenLog, FrozenView
from fedsb.wire.messages import Instruction, decode_instruction, encode_instruction, encode_shared

law = settings(max_examples=25, deadline=None)
SHAPES = {"wide": (5, 12), "tall": (12, 5), "square": (7, 7)}
# Per version: the rank of the residual of each module, 0 where the version does not touch it.
ranks = st.lists(st.fixed_dictionaries({module: st.integers(0, 3) for module in SHAPES}), min_size=1, max_size=6)


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(seed, "test"))


def basis(seed: int = 0) -> State:
    """Return B (m, 2) and A (2, n) of every module."""
    pairs = {module: (gaussian(m, 2, seed=seed), gaussian(2, n, seed=seed + 1)) for module, (m, n) in SHAPES.items()}
    return State({Name(module, role): t for module, pair in pairs.items() for role, t in zip("BA", pair, strict=True)})


def delta(versions: dict[str, int], seed: int) -> State:
    """Return residual factors of the given ranks; U is not contiguous, as a server's may not be."""
    tensors: dict[Name, Tensor] = {}
    for module, rank in versions.items():
        m, n = SHAPES[module]
        if rank:
            tensors[Name(module, "U")] = gaussian(rank, m, seed=seed).T
            tensors[Name(module, "V")] = gaussian(rank, n, seed=seed + 1)
    return State(tensors)


def log_of(versions: Sequence[dict[str, int]], *, with_basis: bool) -> FrozenLog:
    log = FrozenLog()
    if with_basis:
        log.append(basis())
    for number, version in enumerate(versions):
        log.append(delta(version, seed=10 * number))
    return log


def oracle(deltas: Sequence[State]) -> dict[str, Tensor]:
    """Add ``U V`` up in version order, as a slow loop does."""
    residuals: dict[str, Tensor] = {}
    for one in deltas:
        for module in one.modules:
            if Name(module, "U") in one:
                start = residuals.get(module, torch.zeros(SHAPES[module]))
                residuals[module] = torch.addmm(start, one[Name(module, "U")].contiguous(), one[Name(module, "V")].contiguous())
    return residuals


def over_the_wire(bundle: FrozenBundle) -> FrozenBundle:
    content = encode_instruction(Instruction("a", 1, frozen=bundle.head), encode_shared(encode_arrays(State()), bundle))
    received = decode_instruction(content).bundle
    assert received is not None
    return received


def assert_holds(frozen: FrozenView, log: FrozenLog, version: int) -> None:
    deltas = [delta for number, delta in log.deltas().items() if number <= version]
    wanted = oracle(deltas)
    assert frozen.residuals.keys() == wanted.keys()
    assert all(torch.equal(t.matrix(), wanted[module]) for module, t in frozen.residuals.items())
    expected = {n: t for one in deltas for n, t in one.pick("A", "B").items()}
    assert frozen.basis.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in frozen.basis.items())
