"""The hooks' products are those of the dense float64 gradient that autograd gives, and so is what is made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clients.evidence import dense_gradients, sketch_gradients
from fedsb.adapters import layers
from fedsb.adapters.starts import SIDES, Side, Sketch
from fedsb.core.rng import torch_generator, torch_stream
from fedsb.core.state import Name, WeightedSum
from tests.clients.evidence_cases import (
    LANGUAGE_MODELS,
    adapt,
    assert_products,
    built,
    chain,
    micro,
    oracle,
    probes_for,
    square_loss,
    tokens,
)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([nn.Linear, Conv1D]),
    side=st.sampled_from(["right", "left"]),
    sizes=st.tuples(*[st.integers(2, 12)] * 3),
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    length=st.integers(1, 4),
    width=st.integers(1, 5),
)
def test_product_equals_dense_gradient_times_probe(
    kind: type[nn.Module], side: Side, sizes: tuple[int, int, int], counts: list[int], length: int, width: int
) -> None:
    model = chain(kind, sizes)
    batch = torch.randn(sum(counts), length, sizes[0], generator=torch_generator(0, "batch"))
    probes = probes_for(model, side, width)
    found = sketch_gradients(model, micro(batch, *counts), square_loss, probes=probes, side=side)
    assert_products(found, oracle(model, square_loss, batch), probes, side)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_product_on_language_models(kind: str, side: Side) -> None:
    model, loss_fn = built(kind)
    batch, probes = tokens(), probes_for(model, side)
    found = sketch_gradients(model, micro(batch, 1, 3, 2), loss_fn, probes=probes, side=side)
    assert_products(found, oracle(model, loss_fn, batch), probes, side)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_dense_gradients_equal_autograd(kind: str) -> None:
    model, loss_fn = built(kind)
    found = dense_gradients(model, micro(tokens(), 4, 2), loss_fn)
    for name, wanted in oracle(model, loss_fn, tokens()).items():
        assert (found[Name(name, "G")].double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("side", ["right", "left"])
def test_mean_of_clients_sketches_is_the_sketch_of_their_mean_gradient(side: Side) -> None:
    model, loss_fn = built("bert")
    batch, probes = tokens(9), probes_for(model, side)
    mean = WeightedSum()
    for part, count in micro(batch, 2, 6, 1):
        mean.add(sketch_gradients(model, [(part, count)], loss_fn, probes=probes, side=side), count)
    assert_products(mean.mean(), oracle(model, loss_fn, batch), probes, side)


@pytest.mark.parametrize("power_iterations", [0, 1])
def test_federated_sketch_equals_dense_svd_where_rank_allows(power_iterations: int) -> None:
    """Three clients with five tokens in all, so no gradient has a rank above 5 = r."""
    model = chain(nn.Linear, (17, 11, 14))
    batch = torch.randn(5, 1, 17, generator=torch_generator(0, "batch"))
    sketch = Sketch(rank=5, oversample=2, power_iterations=power_iterations, seed=0)
    probes = sketch.probes({name: layer.shape for name, layer in layers(model).items()})
    for exchange in sketch.exchanges:
        mean = WeightedSum()
        for part, count in micro(batch, 1, 2, 2):
            mean.add(sketch_gradients(model, [(part, count)], square_loss, probes=probes, side=SIDES[exchange]), count)
        last, probes = probes, sketch.basis(mean.mean())
    start = sketch.finish(mean.mean(), last)
    for name, g in oracle(model, square_loss, batch).items():
        b, a = start[Name(name, "B")].double(), start[Name(name, "A")].double()
        assert (b.T @ g @ a.T).square().sum() >= (1 - 1e-6) * g.square().sum()
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        kept = int((s > 1e-4 * s[0]).sum())
        assert torch.allclose(b @ b.T @ u[:, :kept], u[:, :kept], atol=1e-4)
        assert torch.allclose(a.T @ a @ vt[:kept].T, vt[:kept].T, atol=1e-4)


class Written(nn.Module):
    """Divides a view of what its first layer gives, in place; the layer sees a constant alone, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("constant", torch.randn(2, 5, generator=torch_generator(0, "constant")))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.constant)
        y.view(2, 2, 2)[:] /= 3.0
        return self.second(torch.tanh(y) + x)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_model_may_write_into_a_view_of_what_a_layer_gives(side: Side) -> None:
    with torch_stream(0, "written"):
        model = adapt(Written())
    batch = torch.randn(3, 2, 4, generator=torch_generator(0, "batch"))
    probes = probes_for(model, side)
    found = sketch_gradients(model, micro(batch, 1, 2), square_loss, probes=probes, side=side)
    assert_products(found, oracle(model, square_loss, batch), probes, side)
