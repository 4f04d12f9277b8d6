"""Networks as torch compiles them."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

PROGRAMS = 64


def compiled(network: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compile a network for batches of any size: one program serves all rounds of a process in which the same factors of one rank learn.

    Torch counts the programs of all models of a process that transformers wraps alike, and goes on uncompiled after eight; here after
    :data:`PROGRAMS`.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, PROGRAMS)
    return cast(nn.Module, torch.compile(network, dynamic=True, backend=backend))
