"""Where the factors start: data-free starts, and the server's half of the gradient start.

A start is a :class:`~fedsb.core.state.State` with every factor of a family (roles ``A``, ``B`` and, where there is one, ``R``).
``W0`` is (m, n) = (out, in), ``B`` (m, r), ``R`` (r, r), ``A`` (r, n). No start shifts ``W0``.

The gradient start is that of LoRA-SB (Ponkshe et al. 2024, arXiv:2411.19557): ``ΔW ≈ −η G``, its rank-r SVD gives ``B`` and
``A``. Here ``G = Σ w_i G_i`` is the clients' weighted mean and its SVD a randomised one (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1) whose every product with ``G`` is a mean of the clients' products: see :class:`Sketch`.
The clients' half is in ``clients/evidence.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State

Shapes = Mapping[str, tuple[int, int]]
Weights = Mapping[str, Tensor]
Side = Literal["right", "left"]

EXACT_UP_TO = 1024  # largest min(m, n) whose Gram matrix is decomposed exactly (0.3 s on one core); subspace iteration above
SUBSPACE_OVERSAMPLE = 16
SUBSPACE_ITERATIONS = 8


def random_lora(shapes: Shapes, rank: int, seed: int) -> State:
    """LoRA's start as in PEFT: A (r, n) Kaiming-uniform with a = √5, that is U(−1/√n, 1/√n), and B zero (Hu et al. 2021, section 4.1)."""
    tensors: dict[Name, Tensor] = {}
    for module, (m, n) in shapes.items():
        stream = torch_generator(seed, "start", module)
        tensors[Name(module, "A")] = nn.init.kaiming_uniform_(torch.empty(rank, n), a=math.sqrt(5), generator=stream)
        tensors[Name(module, "B")] = torch.zeros(m, rank)
    return State(tensors)


def random_core(shapes: Shapes, rank: int, seed: int) -> State:
    """Gaussian A (r, n) ~ N(0, 1/n) and B (m, r) ~ N(0, 1/m), not orthonormalised, and R zero.

    B can't be zero as in LoRA: the gradient of R is ``s Bᵀ G Aᵀ`` and would vanish for ever. The variances give the rows of A and the
    columns of B unit length on average, so one learning rate suits this start and the orthonormal ones.
    """
    tensors: dict[Name, Tensor] = {}
    for module, (m, n) in shapes.items():
        stream = torch_generator(seed, "start", module)
        a, b = torch.randn(rank, n, generator=stream) / n**0.5, torch.randn(m, rank, generator=stream) / m**0.5
        tensors.update(_with_core(module, b, a))
    return State(tensors)


def orthogonal(shapes: Shapes, rank: int, seed: int) -> State:
    """Orthonormal columns of B (m, r) and rows of A (r, n), uniform over all such frames and drawn from the seed; R zero."""
    tensors: dict[Name, Tensor] = {}
    for module, (m, n) in shapes.items():
        stream = torch_generator(seed, "start", module)
        tensors.update(_with_core(module, *frames(m, n, rank, stream)))
    return State(tensors)


def frames(m: int, n: int, rank: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw orthonormal columns (m, r) and rows (r, n), uniform over all such frames, in float32."""
    b, a = (_orthonormal(torch.randn(size, rank, generator=stream, dtype=torch.float64)) for size in (m, n))
    return b.float(), a.T.float()


def weight_svd(weights: Weights, rank: int, seed: int) -> State:
    """LoRA-XS (Bałazy et al. 2024, arXiv:2405.17604): the leading singular vectors of W0 (m, n) as B and A, R zero.

    Unlike the published code A doesn't carry the singular values: both factors are orthonormal in float32.
    """
    tensors: dict[Name, Tensor] = {}
    for module, weight in weights.items():
        b, _, a = leading_pair(weight, rank, seed, module)
        tensors.update(_with_core(module, b, a))
    return State(tensors)


def leading_pair(weight: Tensor, rank: int, seed: int, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading SVD of W0 (m, n) in float32: columns (m, r), singular values (r,), rows (r, n)."""
    b, values, a = _leading_svd(weight.detach(), rank, torch_generator(seed, "start", module))
    return b.float(), values.float(), a.float()


def from_shapes(start: Callable[[Shapes, int, int], State]) -> Callable[[Weights, int, int], State]:
    """Let a start that needs no weights take them all the same, for the table of a family's starts."""
    return lambda weights, rank, seed: start({module: (w.shape[0], w.shape[1]) for module, w in weights.items()}, rank, seed)


# Exchange -> from which side the clients multiply their gradient by the probe that the server sent.
SIDES: dict[str, Side] = {"range": "right", "corange": "left", "core": "left"}


@dataclass(frozen=True)
class Sketch:
    """Randomised SVD of the weighted mean gradient in 2 + 2p exchanges, all of them linear in the clients.

    =========  =======================================  ==================================  ========================
    exchange   probe, from the server                   clients send                        server, from the mean
    =========  =======================================  ==================================  ========================
    range      Ω, later P (n, l), role ``P``            ``G_i P`` (m, l), role ``Y``        ``Q = qr(Y)``, role ``Q``
    corange    Q (m, l), role ``Q``                     ``G_iᵀ Q`` (n, l), role ``Z``       ``P = qr(Z)``, role ``P``
    core       Q (m, l), role ``Q``                     ``G_iᵀ Q`` (n, l), role ``Z``       :meth:`finish`
    =========  =======================================  ==================================  ========================

    Attributes:
        rank: r.
        oversample: columns beyond r; the sketch's width l is r + oversample, capped at min(m, n) of each module.
        power_iterations: p.
        seed: names the streams of Ω, which every client draws for itself, so the first probe costs no bytes.
    """

    rank: int
    oversample: int
    power_iterations: int
    seed: int

    @property
    def exchanges(self) -> tuple[str, ...]:
        """The exchanges in order, keys of :data:`SIDES`."""
        return ("range", *("corange", "range") * self.power_iterations, "core")

    def width(self, m: int, n: int) -> int:
        """Return l = min(r + oversample, m, n)."""
        return min(self.rank + self.oversample, m, n)

    def omega(self, module: str, n: int, width: int) -> Tensor:
        """Draw Ω (n, l) of one module, standard normal, float32."""
        return torch.randn(n, width, generator=torch_generator(self.seed, "sketch", module))

    def probes(self, shapes: Shapes) -> State:
        """Draw the probes of the first exchange, role ``P``."""
        return State({Name(module, "P"): self.omega(module, n, self.width(m, n)) for module, (m, n) in shapes.items()})

    def basis(self, mean: State) -> State:
        """Turn a mean of ``Y`` into the next probes ``Q``, or of ``Z`` into ``P``: orthonormal columns, QR in float64, float32 out."""
        role_of = {"Y": "Q", "Z": "P"}
        return State({Name(name.module, role_of[name.role]): _orthonormal(t.double()).float() for name, t in mean.items()})

    def finish(self, mean: State, basis: State) -> State:
        """End the sketch: ``G ≈ Q Zᵀ``, so the SVD of the small ``Zᵀ = U S Vᵀ`` gives ``B = Q U_r`` and ``A = V_rᵀ``.

        Args:
            mean: mean of the last exchange, ``Z`` (n, l).
            basis: the probes ``Q`` (m, l) of that exchange, as the clients had them.

        Returns:
            ``B`` (m, r) and ``A`` (r, n), orthonormal in float32, and the singular values ``S`` (r,), in units of the gradient, descending.
        """
        tensors: dict[Name, Tensor] = {}
        for name, z in mean.items():
            q = basis[Name(name.module, "Q")]
            tensors.update(_with_values(name.module, _project(z.double(), q.double(), self.rank)))
        return State(tensors)


def sign_start(gradients: State, rank: int, seed: int) -> State:
    """Return ``B``, ``A``, ``S`` of ``sign(G)``: LoRA-SB's ``ΔW = −η sign(G)`` (arXiv:2411.19557); the −η is in :func:`core`.

    Args:
        gradients: dense mean gradients (m, n), role ``G``. The sign of a mean isn't a mean of signs, so they are one party's own.
        rank: r.
        seed: names the streams of the randomised SVD of large modules.
    """
    tensors: dict[Name, Tensor] = {}
    for name, gradient in gradients.items():
        triple = _leading_svd(gradient.sign(), rank, torch_generator(seed, "start", name.module))
        tensors.update(_with_values(name.module, triple))
    return State(tensors)


# init.core -> R0 from the singular values S (r,) and η/s.
CORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "zero": lambda values, step: torch.zeros(len(values), len(values)),
    "spectral": lambda values, step: torch.diag(values).mul(-step),
}


def core(values: State, kind: str, *, step: float, scale: float) -> State:
    """Return ``R0`` (r, r) of each module from its singular values (role ``S``; other roles are ignored).

    ``spectral`` is ``R0 = −(η/s) diag(S)``, so that ``s B R0 A = −η G_r`` whatever the scale: the run starts one rank-r gradient step
    away from W0. (The published code leaves the division by s out and relies on s = 1.)

    Args:
        values: singular values, (r,) each.
        kind: key of :data:`CORES`.
        step: η, the learning rate of that one step.
        scale: s of the layer.
    """
    return State({Name(name.module, "R"): CORES[kind](t, step / scale) for name, t in values.pick("S").items()})


def cored(found: State, kind: str, step: float, scale: float) -> State:
    """Return B and A of a gradient's leading SVD as they are, and the first core between them; see :func:`core`."""
    return found.pick("A", "B").merge(core(found, kind, step=step, scale=scale))


Triple = tuple[Tensor, Tensor, Tensor]  # B (m, r), S (r,), A (r, n) in float64


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormalise columns by QR with a positive diagonal, which makes Q unique; a column without content becomes an arbitrary one.

    In float64: rounding such a Q to float32 leaves ``|QᵀQ − I|`` below 1e-7, float32 QR alone doesn't.
    """
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(matrix)
    return torch.mul(q, signs)


def _leading_svd(matrix: Tensor, rank: int, stream: torch.Generator) -> Triple:
    matrix = matrix.to("cpu", torch.float32)
    exact = min(matrix.shape) <= EXACT_UP_TO
    q = _gram_range(matrix.double(), rank) if exact else _subspace_range(matrix, rank, stream)
    z = matrix.double().T @ q if exact else (matrix.T @ q.float()).double()
    return _project(z, q, rank)


def _gram_range(matrix: Tensor, width: int) -> Tensor:
    """Leading left singular vectors (m, width) from the smaller Gram matrix, 3-5 times cheaper than an SVD of the whole."""
    m, n = matrix.shape
    if m <= n:
        left: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
        return left[:, -width:]
    right: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
    return _orthonormal(matrix @ right[:, -width:])


def _subspace_range(matrix: Tensor, rank: int, stream: torch.Generator) -> Tensor:
    """Approximate the leading left singular vectors (m, l) by subspace iteration (arXiv:0909.4061, algorithm 4.4)."""
    width = min(rank + SUBSPACE_OVERSAMPLE, *matrix.shape)
    q = _orthonormal((matrix @ torch.randn(matrix.shape[1], width, generator=stream)).double())
    for _ in range(SUBSPACE_ITERATIONS):
        p = _orthonormal((matrix.T @ q.float()).double())
        q = _orthonormal((matrix @ p.float()).double())
    return q


def _project(z: Tensor, q: Tensor, rank: int) -> Triple:
    """Return the leading rank-r SVD of ``q zᵀ`` for q (m, l) with orthonormal columns and z (n, l)."""
    u, values, vt = torch.linalg.svd(z.T, full_matrices=False)
    b, a = _orthonormal(q @ u[:, :rank]), vt[:rank]
    # A singular pair is unique up to a common sign; the largest entry of each column of B is made positive.
    flips = torch.where(b.gather(0, b.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0).to(b)  # (1, r)
    return b * flips, values[:rank], a * flips.T


def _with_values(module: str, triple: Triple) -> dict[Name, Tensor]:
    b, values, a = triple
    return {Name(module, "B"): b.float(), Name(module, "S"): values.float(), Name(module, "A"): a.float()}


def _with_core(module: str, b: Tensor, a: Tensor) -> dict[Name, Tensor]:
    rank = b.shape[1]
    return {Name(module, "B"): b.float(), Name(module, "A"): a.float(), Name(module, "R"): torch.zeros(rank, rank)}
