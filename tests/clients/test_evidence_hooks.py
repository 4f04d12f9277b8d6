"""The hooks make no tensor of a gradient's size, leave the model and the generator as found, and refuse what they cannot read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clients.evidence import dense_gradients, sketch_gradients
from fedsb.adapters import layers
from fedsb.adapters.starts import Side
from fedsb.core.state import Name, State
from tests.clients.evidence_cases import (
    LANGUAGE_MODELS,
    Chain,
    DenseWatch,
    adapt,
    built,
    label_loss,
    micro,
    probes_for,
    square_loss,
    tokens,
)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_no_tensor_of_the_gradients_size_is_made(kind: str, side: Side) -> None:
    model, loss_fn = built(kind)
    probes, batches = probes_for(model, side), micro(tokens(4, 7), 3, 1)
    with DenseWatch(model) as watch:
        sketch_gradients(model, batches, loss_fn, probes=probes, side=side)
    assert watch.found == []


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_watch_sees_a_dense_gradient(kind: str) -> None:
    model, loss_fn = built(kind)
    with DenseWatch(model) as watch:
        dense_gradients(model, micro(tokens(4, 7), 3, 1), loss_fn)
    assert {shape for _, shape in watch.found} >= {layer.shape for layer in layers(model).values()}


@pytest.fixture
def model() -> nn.Module:
    return built("bert")[0]


def test_model_and_global_generator_are_left_as_found(model: nn.Module) -> None:
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    model.classifier.weight.requires_grad_(True)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    before = torch.get_rng_state()
    first = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes_for(model, "right"), side="right")
    again = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes_for(model, "right"), side="right")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert trainable == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


def test_model_is_restored_when_the_loss_fails(model: nn.Module) -> None:
    def fail(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    model.train()
    with pytest.raises(RuntimeError, match="no loss"):
        sketch_gradients(model, micro(tokens(), 6), fail, probes=probes_for(model, "left"), side="left")
    assert model.training
    assert all(layer.active and not layer.base._forward_hooks for layer in layers(model).values())


def test_bfloat16_weights_give_float32_products(model: nn.Module) -> None:
    probes = probes_for(model, "right")
    wanted = sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes, side="right")
    found = sketch_gradients(model.bfloat16(), micro(tokens(), 6), label_loss, probes=probes, side="right")
    for name, t in found.items():
        assert t.dtype == torch.float32
        assert (t - wanted[name]).norm() < 0.2 * wanted[name].norm()


def test_probes_of_other_layers_are_refused(model: nn.Module) -> None:
    probes = State({Name("elsewhere", "P"): torch.ones(24, 2)})
    with pytest.raises(ValueError, match=r"probes for \['elsewhere'\] don't fit the adapted layers"):
        sketch_gradients(model, micro(tokens(), 6), label_loss, probes=probes, side="right")


def test_no_examples_and_a_loss_without_adapted_layers_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        dense_gradients(model, [], label_loss)
    with pytest.raises(ValueError, match="depends on no adapted layer"):
        dense_gradients(model, micro(tokens(), 6), lambda model, batch: torch.ones(()))


def test_an_input_changed_in_place_is_refused() -> None:
    class Overwriting(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.first(x)
            x.zero_()
            return self.second(torch.tanh(y))

    model = adapt(Overwriting(nn.Linear, (5, 4, 3)))
    with pytest.raises(RuntimeError, match="changes the input of 'first' in place"):
        sketch_gradients(model, micro(torch.ones(2, 3, 5), 2), square_loss, probes=probes_for(model, "left"), side="left")
