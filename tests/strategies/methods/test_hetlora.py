"""HetLoRA is what its paper says, written out densely; its weights are those of norms alone; what nobody holds stays able to learn."""

from __future__ import annotations

import pytest
import torch

from fedsb.adapters import SPECS
from fedsb.core.rng import torch_generator
from fedsb.core.state import HEAD, Name, State
from strategies.methods.hetlora import NormWeighted
from strategies.reducers import Aggregate
from tests.strategies.uploads import reduce

SHAPES = {"x": (9, 7), "y": (5, 12)}
HEADS = Name("c", HEAD)


def drawn(rank: int, seed: int, size: float = 1.0) -> State:
    """Return an upload of a rank, or what was sent of it."""
    draw = torch_generator(seed, "uploads")
    found = {HEADS: torch.randn(3, generator=draw)}
    for module, (m, n) in SHAPES.items():
        found[Name(module, "B")] = size * torch.randn(m, rank, generator=draw)
        found[Name(module, "A")] = torch.randn(rank, n, generator=draw)
    return State(found)


def made(uploads: list[State], weights: list[float]) -> Aggregate:
    return reduce(NormWeighted(SPECS["lora"]), uploads, weights, drawn(4, 99))


@pytest.mark.parametrize("ranks", [(3, 2, 1), (4, 1, 1), (2, 2, 2)], ids=str)
def test_it_is_the_papers_mean_with_what_nobody_holds_as_it_was(ranks: tuple[int, ...]) -> None:
    uploads = [drawn(rank, seed, size) for rank, seed, size in zip(ranks, (1, 2, 3), (0.5, 3.0, 1.0), strict=True)]
    norms = [sum(float((u[Name(m, "B")].double() @ u[Name(m, "A")].double()).square().sum()) for m in SHAPES) ** 0.5 for u in uploads]
    shares = [norm / sum(norms) for norm in norms]
    found, sent, most = made(uploads, [30.0, 1.0, 4.0]), drawn(4, 99), max(ranks)
    for module, (m, n) in SHAPES.items():
        b, a = torch.zeros(m, 4, dtype=torch.float64), torch.zeros(4, n, dtype=torch.float64)
        for share, rank, upload in zip(shares, ranks, uploads, strict=True):
            b[:, :rank] += share * upload[Name(module, "B")].double()
            a[:rank] += share * upload[Name(module, "A")].double()
        b[:, most:], a[most:] = sent[Name(module, "B")][:, most:], sent[Name(module, "A")][most:]
        assert torch.allclose(found.state[Name(module, "B")], b, atol=1e-12)
        assert torch.allclose(found.state[Name(module, "A")], a, atol=1e-12)
    head = sum(w / 35 * u[HEADS].double() for w, u in zip((30, 1, 4), uploads, strict=True))
    assert torch.allclose(found.state[HEADS], head, atol=1e-12)
    assert found.extras["largest_share"] == pytest.approx(max(shares))


def test_numbers_of_examples_weigh_the_head_alone() -> None:
    uploads = [drawn(2, 1), drawn(4, 2)]
    one, other = made(uploads, [1.0, 1.0]), made(uploads, [1.0, 50.0])
    assert not torch.equal(one.state[HEADS], other.state[HEADS])
    assert all(torch.equal(t, other.state[name]) for name, t in one.state.items() if name.role != HEAD)


def test_where_no_upload_has_a_product_what_was_sent_stays() -> None:
    found, sent = made([drawn(2, 1, size=0.0), drawn(4, 2, size=0.0)], [1.0, 2.0]), drawn(4, 99)
    assert all(torch.equal(t, sent[name].double()) for name, t in found.state.items() if name.role != HEAD)
    assert found.extras["largest_share"] == 0


def test_equal_uploads_are_their_own_mean() -> None:
    """Of the whole rank: there is nothing to pad, and the weights do not matter."""
    upload = drawn(4, 1)
    found = made([upload, upload, upload], [1.0, 2.0, 3.0])
    assert all(torch.allclose(t, upload[name].double(), atol=1e-12) for name, t in found.state.items())
