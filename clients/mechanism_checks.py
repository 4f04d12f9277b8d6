"""What the clipping and the noise do, tried on gradients made up for it and held against what was charged; nothing here reads data.

A test of noise fails sound code with a probability of at most :data:`NEVER`, of which a round makes as many as it has tensors and steps;
the sum of squares of N values of noise is below ``N − 9 √(2 N)`` with one below e^-40 (Laurent and Massart 2000), and two independent
noises of N values have a cosine above ``9 / √N`` with one below 2 e^-40. What is tried on made-up gradients is drawn from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clients.clipping import Clipping, FlatClipping
from fedsb.privacy.codes import SelfCheckFailed

NEVER = 1e-18
DEVIATIONS = 9
# The made-up gradients' norm over C, and steps that are tried.
EXCESS, STEPS = 100.0, 8
# A sum's own rounding: of an example's share, and of a float32 over all that it holds.
SHARE, ROUNDING = 1e-5, 1e-6


def too_small(square: float, count: int) -> bool:
    """Tell whether the sum of squares of standard normal values is below what it is with probability :data:`NEVER`.

    ``P(χ²_n < t) <= (t / 2)^(n / 2) / Γ(n / 2 + 1)``, for any n, one value included.
    """
    return square < 2 * math.exp((math.log(NEVER) + math.lgamma(count / 2 + 1)) * 2 / count)


class Noises:
    """The noise of a round's steps in units of what was charged: tensor by tensor, altogether, and step against step.

    Args:
        optimizer: adds it.
        charged: the noise multiplier in the ledger; without noise nothing is held.
    """

    def __init__(self, optimizer: FlatClipping, charged: float) -> None:
        self._optimizer, self._charged = optimizer, charged
        self._squares = [0.0] * len(optimizer.params)
        self._kept: list[Tensor] = []
        self.steps = self._values = 0

    def add(self) -> None:
        """Take in a step's noise, while ``summed_grad`` still is without it.

        Raises:
            SelfCheckFailed: ``noise``.
        """
        self.steps += 1
        o = self._optimizer
        scale = self._charged * o.max_grad_norm
        if not scale:
            return
        self._values += sum(p.numel() for p in o.params)
        noise = [(p.grad.double() * o.expected_batch_size - p.summed_grad.double()).flatten() / scale for p in o.params]
        squares = [float(t.square().sum()) for t in noise]
        self._squares = [a + b for a, b in zip(self._squares, squares, strict=True)]
        counts = [self.steps * t.numel() for t in noise]
        if any(too_small(s, t.numel()) for s, t in zip(squares, noise, strict=True)) or any(map(too_small, self._squares, counts)):
            raise SelfCheckFailed("noise")
        self._compare(torch.cat(noise))

    def finish(self) -> None:
        """Hold all of the noise against what was charged.

        Raises:
            SelfCheckFailed: ``noise``.
        """
        if sum(self._squares) < self._values - DEVIATIONS * math.sqrt(2 * self._values):
            raise SelfCheckFailed("noise")

    def _compare(self, noise: Tensor) -> None:
        """Hold that a step's noise is neither that of the step before nor that of the first, nor follows it."""
        for other in self._kept:
            cosine = float(torch.nn.functional.cosine_similarity(noise, other, dim=0))
            apart = min(float((noise - other).square().sum()), float((noise + other).square().sum())) / 2
            if too_small(apart, len(noise)) or abs(cosine) > DEVIATIONS / math.sqrt(len(noise)):
                raise SelfCheckFailed("noise")
        self._kept = [*self._kept[:1], noise]


def hold_mechanism(optimizer: FlatClipping, clipping: Clipping, charged: float) -> None:
    """Try a second instance of the optimiser's class, on tensors of the same shapes.

    Args:
        optimizer: of the round; it is left alone.
        clipping: what it was made with.
        charged: the noise multiplier in the ledger.

    Raises:
        SelfCheckFailed: ``bound``, ``clipped_sum``, ``steps`` or ``noise``.
    """
    tensors = [nn.Parameter(torch.zeros_like(p)) for p in optimizer.params]
    draw = torch.Generator(tensors[0].device).manual_seed(0)
    plain = torch.optim.SGD(tensors, lr=0.0)
    trial = type(optimizer)(plain, clipping, expected_batch=1.0, generator=draw)
    for rows in (1, 3):
        _hold_bound(trial, rows, draw)
    _hold_noise(trial, Noises(trial, charged))


def _hold_bound(trial: FlatClipping, rows: int, draw: torch.Generator) -> None:
    """Hold that the sum over examples whose every tensor is much longer than C is no longer than that many C, and reaches every tensor."""
    trial.zero_grad(set_to_none=True)
    for p in trial.params:
        made = torch.randn((rows, *p.shape), generator=draw, device=p.device).flatten(1)
        p.grad_sample = (EXCESS * trial.max_grad_norm * nn.functional.normalize(made)).view(rows, *p.shape)
    trial.clip_and_accumulate()
    if not joint_norm([p.summed_grad for p in trial.params]) <= rows * trial.max_grad_norm * (1 + SHARE):
        raise SelfCheckFailed("bound")
    if not all(bool(p.summed_grad.any()) for p in trial.params):
        raise SelfCheckFailed("clipped_sum")


def _hold_noise(trial: FlatClipping, noises: Noises) -> None:
    trial.observers.append(noises.add)
    for _ in range(STEPS):
        trial.zero_grad(set_to_none=True)
        for p in trial.params:
            p.grad_sample = p.new_zeros((0, *p.shape))
        trial.pre_step()
    if noises.steps != STEPS:
        raise SelfCheckFailed("steps")
    noises.finish()


class Bounds:
    """What every physical batch of a round adds to the sum, held against ``count · C``.

    Args:
        optimizer: adds it.
    """

    def __init__(self, optimizer: FlatClipping) -> None:
        self._optimizer = optimizer
        self._before: list[Tensor] = []
        self._given = self._batch = 0
        self._bound = 0.0

    def given(self, examples: int) -> None:
        """Note how many examples the next batch has, and the C of its step."""
        self._batch = examples
        self._given += examples
        self._bound = float(self._optimizer.max_grad_norm)

    def added(self, *, last: bool) -> None:
        """Hold what the batch has added.

        Args:
            last: whether the step ends with it.

        Raises:
            SelfCheckFailed: ``bound``.
        """
        now = [p.summed_grad.double() for p in self._optimizer.params]
        change = [a - b for a, b in zip(now, self._before, strict=True)] if self._before else now
        room = self._batch * (1 + SHARE) + self._given * ROUNDING
        if not joint_norm(change) <= room * self._bound:
            raise SelfCheckFailed("bound")
        self._before, self._given = ([], 0) if last else (now, self._given)


def joint_norm(tensors: Sequence[Tensor]) -> float:
    """Return the joint norm."""
    return float(torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm())
