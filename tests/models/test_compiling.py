"""Training is compiled for each rank that clients have, however many these are, and computes what it does without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fedsb.adapters import SPECS, attach, write
from fedsb.core.rng import torch_generator
from fedsb.core.state import Name, State
from fedsb.models.compiling import compiled

M, N, RANKS = 11, 13, range(1, 11)  # more ranks than torch compiles a network for


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    network.zero_grad()
    network(x).square().sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None]


@pytest.fixture
def limit() -> Iterator[None]:
    """Give torch its own limit, and back what was there."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("limit")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_clients_of_ten_ranks_train_by_ten_programs() -> None:
    network, draw = nn.Sequential(nn.Linear(N, M)), torch_generator(0, "ranks")
    attach(network, SPECS["lora"], targets=["0"], rank=max(RANKS), scale=0.5)
    fast = compiled(network, "eager")
    for _ in range(2):
        for rank in RANKS:
            shapes = {"A": (rank, N), "B": (M, rank)}
            write(network, State({Name("0", role): torch.randn(shape, generator=draw) for role, shape in shapes.items()}))
            x = torch.randn(4, N, generator=draw)
            ours, plain = gradients(fast, x), gradients(network, x)
            assert [g.shape for g in ours] == [torch.Size((rank, N)), torch.Size((M, rank))]
            torch.testing.assert_close(ours, plain)
    assert counters["stats"]["unique_graphs"] == len(RANKS)
