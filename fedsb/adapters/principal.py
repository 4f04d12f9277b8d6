"""Starts of B and A that are a part of W0, which is taken out of W0 for it: the run begins at the pretrained weights all the same."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsb.adapters.spec import Weights
from fedsb.adapters.starts import leading_pair
from fedsb.core.state import Name, State


def pissa(weights: Weights, rank: int, seed: int) -> State:
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): ``B = U √S`` and ``A = √S Vᵀ`` of W0's leading SVD, for s = 1."""
    tensors: dict[Name, Tensor] = {}
    for module, weight in weights.items():
        b, values, a = leading_pair(weight, rank, seed, module)
        root = values.sqrt()
        tensors |= {Name(module, "B"): b * root, Name(module, "A"): root[:, None] * a}
    return State(tensors)


def olora(weights: Weights, rank: int, seed: int) -> State:
    """OLoRA (Büyükakyüz 2024, arXiv:2406.01775): the first columns of Q and rows of R of ``W0 = Q R``."""
    tensors: dict[Name, Tensor] = {}
    for module, weight in weights.items():
        q, r = torch.linalg.qr(weight.detach().to("cpu", torch.float64))
        tensors |= {Name(module, "B"): q[:, :rank].float(), Name(module, "A"): r[:rank].float()}
    return State(tensors)


def for_scale(factors: State, scale: float) -> State:
    """Divide B and A by √s, so that ``s B A`` is one part of W0 whatever s is, as PEFT does: s = 2 would turn it round."""
    return factors.map(lambda t: t / scale**0.5)


def whatever_scale(factors: State, scale: float) -> State:
    """Leave B and A as they are, as PEFT's OLoRA does: s B A is s times the part of W0."""
    return factors
